"""The Fisher scores against plain per-sample autograd, against hand numbers, and where vmap cannot go."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Evidence, Sparsity, choose, gradients
from fedsparse.masks.rules import Fisher
from fedsparse.masks.scores import fisher, fisher_batch, fisher_per_sample


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


def squared_error(forward, x, y):
    return 0.5 * (forward(x).squeeze(-1) - y) ** 2


def batch(shape, classes=3, dtype=torch.float32):
    rng = np.random.default_rng([5, *shape])
    return torch.from_numpy(rng.normal(size=shape)).to(dtype), torch.from_numpy(rng.integers(0, classes, shape[0]))


def mlp(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)


def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=3
        )
        nn.init.normal_(net.head.weight)
    return net


def plain_sum(net, space, x, y):
    """Backward of one sample at a time, on the network itself."""
    net.eval()
    total = np.zeros(space.size)
    for i in range(len(x)):
        net.zero_grad()
        cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        total += np.concatenate([t.grad.double().numpy().ravel() ** 2 for t in space.tensors(net)])
    net.zero_grad()
    return total


@pytest.mark.parametrize("chunk", [1, 4, 8, 100])
def test_per_sample_equals_a_plain_loop_on_an_mlp(chunk):
    net, (x, y) = mlp(torch.float64), batch((11, 4), dtype=torch.float64)
    space = ParamSpace.of(net)
    found = fisher_per_sample(net, space, x, y, loss=losses, chunk=chunk)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, plain_sum(net, space, x, y), rtol=1e-12, atol=1e-18)


def test_per_sample_equals_a_plain_loop_on_a_vision_transformer():
    net, (x, y) = vit(), batch((10, 1, 8, 8))
    space = ParamSpace.of(net)
    found = fisher_per_sample(net, space, x, y, loss=losses)
    np.testing.assert_allclose(found, plain_sum(net, space, x, y), rtol=1e-3, atol=1e-9)
    assert (found.numpy() > 0).mean() > 0.9


def test_hand_numbers_of_a_linear_model_and_the_trap_of_the_two_forms():
    # Loss (w.x - y)^2 / 2 at w = (1, 1); gradient (w.x - y) x. The two samples cancel in the first coordinate:
    #   x = (1, 1), y = 0: residual  2, gradient ( 2, 2)
    #   x = (1, 0), y = 3: residual -2, gradient (-2, 0)
    # Sum of squares (8, 4); the mean gradient is (0, 1), so 2 * its square is (0, 2): the order is reversed.
    net = nn.Linear(2, 1, bias=False)
    nn.init.ones_(net.weight)
    space = ParamSpace.of(net)
    x, y = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 3])
    assert fisher_per_sample(net, space, x, y, loss=squared_error).tolist() == [8.0, 4.0]
    assert fisher_batch(net, space, x, y, loss=squared_error).tolist() == [0.0, 2.0]


def test_batch_form_equals_a_plain_backward():
    net, (x, y) = mlp(torch.float64), batch((7, 4), dtype=torch.float64)
    space = ParamSpace.of(net)
    found = fisher_batch(net, space, x, y, loss=losses)
    net.eval()
    cross_entropy(net(x), y).backward()
    expected = 7 * np.concatenate([p.grad.numpy().ravel() for p in net.parameters()]) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_scores_add_over_batches():
    net, (x, y) = mlp(), batch((8, 4))
    space = ParamSpace.of(net)
    halves = [fisher_per_sample(net, space, x[i : i + 4], y[i : i + 4], loss=losses, chunk=4) for i in (0, 4)]
    whole = fisher_per_sample(net, space, x, y, loss=losses, chunk=4)
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", [fisher_per_sample, fisher_batch])
def test_the_network_comes_back_as_it_was(measure):
    net, (x, y) = mlp(), batch((5, 4))
    net.train()
    net[0].eval()
    net[3].bias.requires_grad_(False)
    before = {name: p.clone() for name, p in net.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():  # the caller's grad mode does not matter
        measure(net, ParamSpace.of(net), x, y, loss=losses)
    assert [module.training for module in net] == [False, True, True, True]
    assert not net[3].bias.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("measure", [fisher_per_sample, fisher_batch])
def test_frozen_parameters_outside_the_space_are_left_out(measure):
    net, (x, y) = mlp(), batch((5, 4))
    part = ParamSpace.of(net, trainable=lambda name: name.startswith("3."))
    whole = ParamSpace.of(net)
    net[0].requires_grad_(False)
    found = measure(net, part, x, y, loss=losses)
    torch.testing.assert_close(found, measure(net, whole, x, y, loss=losses)[whole.where("3.*")], rtol=1e-6, atol=0)
    assert not found.requires_grad


@pytest.mark.parametrize(("net", "shape"), [(mlp(), (9, 4)), (vit(), (9, 1, 8, 8))])
def test_a_model_that_vmap_can_run_runs_stacked(net, shape, monkeypatch):
    monkeypatch.setattr("fedsparse.masks.gradients.gradients", lambda *_: pytest.fail("one by one"))
    assert fisher_per_sample(net, ParamSpace.of(net), *batch(shape), loss=losses).any()


class Branching(nn.Module):
    """Asks for the value of a tensor, as some attention masks do: vmap refuses it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.inner(x) if x.abs().sum() > 0 else self.inner(-x)


def test_a_model_that_vmap_cannot_run_takes_one_sample_at_a_time():
    plain, (x, y) = mlp(torch.float64), batch((11, 4), dtype=torch.float64)
    net = Branching(plain)
    space = ParamSpace.of(net)
    found = fisher_per_sample(net, space, x, y, loss=losses)
    expected = fisher_per_sample(plain, ParamSpace.of(plain), x, y, loss=losses)
    torch.testing.assert_close(found[space.where("inner.*")], expected, rtol=1e-12, atol=1e-18)
    assert found[space.where("unused")].tolist() == [0.0, 0.0]
    assert set(net.calls) == {1}


def test_an_error_of_the_loss_itself_is_not_swallowed():
    net, (x, y) = mlp(), batch((4, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fisher_per_sample(net, ParamSpace.of(net), x[:, :3], y, loss=losses)


def test_tied_weights_score_the_sum_of_their_uses():
    net, (x, y) = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), batch((6, 4), 4, torch.float64)
    net[2].weight = net[0].weight
    space = ParamSpace.of(net)
    np.testing.assert_allclose(
        fisher_per_sample(net, space, x, y, loss=losses), plain_sum(net, space, x, y), rtol=1e-12
    )


def test_an_empty_batch_adds_nothing():
    net, (x, y) = mlp(), batch((3, 4))
    for measure in (fisher_per_sample, fisher_batch):
        assert not measure(net, ParamSpace.of(net), x[:0], y[:0], loss=losses).any()


@pytest.mark.parametrize("measure", [fisher_per_sample, fisher_batch])
def test_labels_of_the_model_come_from_its_softmax_and_the_generator(measure):
    net, (x, _) = mlp(), batch((6, 4))
    net[3].bias.data = torch.tensor([0.0, 100.0, 0.0])  # the model is sure of class 1
    space, wrong, sure = ParamSpace.of(net), torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)
    drawn = measure(net, space, x, wrong, loss=losses, labels="model", generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, measure(net, space, x, sure, loss=losses))
    assert not torch.equal(drawn, measure(net, space, x, wrong, loss=losses))


def test_drawn_labels_make_the_expected_fisher_on_average():
    # One softmax layer at zero: F of class c's bias is p(1-p) = 2/9, hand-derived; 6000 draws, error about 1 %.
    net = nn.Linear(1, 3)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    space, x = ParamSpace.of(net), torch.ones(6000, 1)
    y, generator = torch.zeros(6000, dtype=torch.long), torch.Generator().manual_seed(3)
    found = fisher_per_sample(net, space, x, y, loss=losses, labels="model", generator=generator, chunk=1000)
    np.testing.assert_allclose(found[space.where("bias")] / 6000, [2 / 9] * 3, rtol=0.05)


def test_labels_are_checked():
    net, (x, y) = mlp(), batch((2, 4))
    with pytest.raises(ValueError, match="calibration.labels is 'truth'; it must be data or model"):
        fisher_batch(net, ParamSpace.of(net), x, y, loss=losses, labels="truth")
    with pytest.raises(ValueError, match="generator"):
        fisher_per_sample(net, ParamSpace.of(net), x, y, loss=losses, labels="model")


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_a_head_of_zeros_is_refused(fisher):
    net, (x, y) = mlp(), batch((6, 4))
    nn.init.zeros_(net[3].weight)
    space, rule = ParamSpace.of(net), Fisher(largest=False, fisher=fisher)
    observed = rule.observe(net, space, x, y, loss=losses)
    with pytest.raises(ValueError, match="a head of zeros"):
        choose(rule, Evidence(space, space.read(net), Sparsity(0.8, always_train="3.*"), observed=observed))


@pytest.mark.parametrize("per_sample", [True, False])
def test_fisher_is_the_mean_over_samples_of_all_batches(per_sample):
    net, (x, y) = mlp(torch.float64).train(), batch((11, 4), dtype=torch.float64)
    halves = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = fisher(net, iter(halves), per_sample=per_sample)
    assert net.training
    if per_sample:
        expected = plain_sum(net, ParamSpace.of(net), x, y) / 11
    else:  # sum over batches of b * (gradient of the mean)^2, over the number of samples
        expected = 0
        for inputs, labels in halves:
            net.eval().zero_grad()
            cross_entropy(net(inputs), labels).backward()
            expected += len(labels) * np.concatenate([p.grad.numpy().ravel() for p in net.parameters()]) ** 2 / 11
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-18)


def test_fisher_scores_what_requires_a_gradient_and_draws_labels():
    net, (x, y) = mlp(), batch((6, 4))
    net[3].bias.data = torch.tensor([0.0, 100.0, 0.0])
    drawn = fisher(net, [(x, y)], labels="model", generator=torch.Generator())
    assert torch.equal(drawn, fisher(net, [(x, torch.ones_like(y))]))
    net[0].requires_grad_(False)
    part = fisher(net, [(x, y)])
    assert len(part) == 6 * 3 + 3
    with pytest.raises(ValueError, match="hand in a generator"):
        fisher(net, [(x, y)], labels="model")
    with pytest.raises(ValueError, match="hold no samples"):
        fisher(net, [])
    with pytest.raises(ValueError, match="requires a gradient"):
        fisher(net.requires_grad_(False), [(x, y)])


def test_tensors_that_share_their_gradient_are_not_squared_twice():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))

        def forward(self, x):
            return x + (self.a + self.b)

    net, (x, y) = Sum(), batch((4, 3), dtype=torch.float64)
    for chunk in (1, 4):
        found = fisher_per_sample(net, ParamSpace.of(net), x, y, loss=losses, chunk=chunk)
        np.testing.assert_allclose(found, plain_sum(net, ParamSpace.of(net), x, y), rtol=1e-12)


def test_a_chunk_that_does_not_fit_the_memory_is_halved(monkeypatch):
    sizes, real = [], gradients.stacked_gradients

    def small_memory(net, params, x, y, loss):
        sizes.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(net, params, x, y, loss)

    monkeypatch.setattr(gradients, "stacked_gradients", small_memory)
    net, (x, y) = mlp(torch.float64), batch((11, 4), dtype=torch.float64)
    found = fisher_per_sample(net, ParamSpace.of(net), x, y, loss=losses, chunk=16)
    assert sizes == [11, 8, 4, 4, 3]
    np.testing.assert_allclose(found, plain_sum(net, ParamSpace.of(net), x, y), rtol=1e-12, atol=1e-18)


def test_memory_that_one_sample_does_not_fit_is_an_error(monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gradients, "stacked_gradients", none)
    monkeypatch.setattr(gradients, "gradients", none)
    net, (x, y) = mlp(), batch((5, 4))
    with pytest.raises(torch.OutOfMemoryError):
        fisher_per_sample(net, ParamSpace.of(net), x, y, loss=losses)


def test_the_chunk_suits_model_and_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = [0, 10_000, 800_000, 4_000_000, 22_000_000, 88_000_000]
    assert [gradients.automatic_chunk(size, cpu) for size in sizes] == [32, 32, 32, 8, 1, 1]
    # 10 GB free and 4 GB kept by torch's allocator unused; four times the model for a sample
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10e9, 16e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000_000)
    assert gradients.automatic_chunk(88_000_000, gpu) == 39
    assert gradients.automatic_chunk(8_000_000_000, gpu) == 1


@pytest.mark.parametrize("rule", [Fisher(largest=True), Fisher(largest=True, fisher="batch")])
def test_observe_adds_to_what_it_is_given_in_place(rule):
    net, (x, y) = mlp(), batch((5, 4))
    space = ParamSpace.of(net)
    total = torch.full((space.size,), 3.0, dtype=torch.float64)
    assert rule.observe(net, space, x, y, loss=losses, into=total) is total
    torch.testing.assert_close(total, 3 + rule.observe(net, space, x, y, loss=losses), rtol=1e-12, atol=1e-12)
