"""The next-character LSTM against the gates written out, its published size, and one client's training."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from plain import plain_fedavg, replay
from small import Small, uneven_parts
from torch.func import functional_call
from torch.nn import functional as F

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Dataset, Split
from fedsparse.masks import top_fraction
from fedsparse.masks.gradients import add_squares
from fedsparse.models.chars import next_char_lstm
from fedsparse.optim.index import LARGE
from fedsparse.simulation.module import ClientModule


def letters(*shape, vocabulary=5):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).int()


def tiny(seed=0):
    return next_char_lstm(5, embedding=3, hidden=4, seed=seed)


def written_out(net, x):
    """Layers of an LSTM by a loop over the characters: gates in the order input, forget, cell, output."""
    sequence = [net.embedding.weight[x[:, t].long()] for t in range(x.shape[1])]
    for layer in range(net.lstm.num_layers):
        names = [f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        w, r, b, c = (getattr(net.lstm, name) for name in names)
        hidden = cell = sequence[0].new_zeros(len(x), net.lstm.hidden_size)
        for t, value in enumerate(sequence):
            i, f, g, o = (value @ w.T + b + hidden @ r.T + c).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            sequence[t] = hidden
    return sequence[-1] @ net.head.weight.T + net.head.bias


def test_it_is_the_published_size():
    net = next_char_lstm(80)
    # 80 x 8, 4 x 256 x (8 + 256 + 2), 4 x 256 x (256 + 256 + 2), 257 x 80
    assert sum(p.numel() for p in net.parameters()) == 640 + 272_384 + 526_336 + 20_560 == 819_920
    assert net(letters(2, 80, vocabulary=80)).shape == (2, 80)
    assert net.vocabulary == 80


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_gradients_are_those_of_the_gates(training, dtype):
    net = tiny().to(dtype).train(training)
    other, x, y = copy.deepcopy(net), letters(6, 9), torch.arange(6) % 5
    found, wanted = net(x), written_out(other, x)
    torch.testing.assert_close(found, wanted)
    F.cross_entropy(found, y).backward()
    F.cross_entropy(wanted, y).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_scores_are_squared_gradients_of_single_texts():
    net = tiny().eval()
    space, x, y = ParamSpace.of(net), letters(4, 9), torch.tensor([0, 3, 1, 4])
    found, wanted = (torch.zeros(space.size, dtype=torch.float64) for _ in range(2))
    add_squares(found, net, space, x, y, loss=lambda f, x, y: F.cross_entropy(f(x), y, reduction="none"))
    for text, label in zip(x, y, strict=True):
        net.zero_grad()
        F.cross_entropy(written_out(net, text[None]), label[None]).backward()
        wanted += torch.cat([p.grad.flatten() for p in net.parameters()]).double() ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)
    with pytest.raises(RuntimeError, match="data-dependent"):  # so that scores go text by text
        torch.vmap(torch.func.grad(lambda p, x: functional_call(net, p, (x[None],)).sum()), (None, 0))(
            {name: p.detach() for name, p in net.named_parameters()}, x
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("large", [1, LARGE])
def test_a_federation_of_it_equals_a_plain_loop(tmp_path, masked, large):
    net, x = tiny().double(), letters(60, 9)
    splits = [Split(x[a:b], x[a:b, -1].long()) for a, b in ((0, 40), (40, 50), (50, 60))]
    space = ParamSpace.of(net)
    mask = top_fraction(torch.rand(space.size, generator=torch.Generator().manual_seed(3)), 0.4) if masked else None
    start, client = copy.deepcopy(net), partial(ClientModule, large=large)
    dataset = Dataset(*splits, 5, "letters", vocabulary=5)
    small = Small(net, dataset, uneven_parts(40, 4), mask=mask, count=3, clip=0.5, client=client)
    masks = space.unflatten(mask) if masked else None
    rounds = replay(small.plan, 2)
    plain, _ = plain_fedavg(start, splits[0].x, splits[0].y, rounds, lr=0.2, momentum=0.9, clip=0.5, masks=masks)
    small.fit(2, tmp_path)
    assert not torch.allclose(space.read(plain), space.read(start), atol=1e-3)
    torch.testing.assert_close(small.row, space.read(plain), rtol=0, atol=1e-9)


def test_the_seed_decides_everything_and_nothing_else():
    before = torch.get_rng_state()
    first = tiny().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert all(torch.equal(value, tiny().state_dict()[name]) for name, value in first.items())
    assert not torch.equal(first["lstm.weight_hh_l1"], tiny(1).state_dict()["lstm.weight_hh_l1"])
    assert first["head.weight"].abs().max() <= 0.04
    assert not first["head.bias"].any()


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")  # the LSTM's own list of its weights
def test_it_can_be_exported():
    """Its refusal of vmap asks for a value, which a graph cannot give."""
    net, x = tiny().eval(), letters(2, 3)
    graph = torch.export.export(net, (x,)).module()
    assert torch.allclose(graph(x), net(x), atol=1e-6)


def test_cudnn_is_left_aside_only_where_it_cannot_differentiate():
    net, seen = tiny(), []
    net.lstm.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    net.train()(letters(1, 3))
    net.eval()(letters(1, 3))
    with torch.no_grad():
        net(letters(1, 3))
    assert seen == [True, False, True]
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes is .*; it must be a whole number of 1 or more"),
        ({"vocabulary": 0}, "model.vocabulary is 0"),
        ({"hidden": -1}, "model.hidden is -1"),
        ({"dropout": 0.5, "layers": 1}, "model.dropout is 0.5 with 1 layers"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message) as error:
        next_char_lstm(**{"num_classes": 5, **options})
    assert "\n" not in str(error.value)
