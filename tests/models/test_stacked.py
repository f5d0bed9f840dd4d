"""Layers and networks with the weights of several clients against one client after the other."""

from __future__ import annotations

import copy
import itertools

import lightning
import pytest
import torch
from small import Small, small_data, small_net, uneven_parts
from test_federation import unit_mask
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsparse.core.space import ParamSpace
from fedsparse.models.convnets import resnet18_gn
from fedsparse.models.stacked import CACHE, Stacked, stacks
from fedsparse.models.vision import conv, mlp, vit_digits
from fedsparse.simulation import autotune
from fedsparse.simulation.module import ClientModule

K, B = 3, 4


class Token(nn.Module):
    """Adds a learned token to a sequence, as a vision transformer does."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6, dtype=torch.float64))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


def images(channels, side=6):
    return torch.randn(K, B, channels, side, side, dtype=torch.float64)


def tokens():
    return torch.randn(K, B, 5, 6, dtype=torch.float64)


CONVOLUTIONS = {
    "convolution": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "convolution without bias": lambda: nn.Conv2d(4, 6, 3, bias=False, dilation=2),
    "convolution in groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), tokens),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), tokens),
    "linear of vectors": (lambda: nn.Linear(6, 3), lambda: tokens()[:, :, 0]),
    **{name: (build, lambda: images(4)) for name, build in CONVOLUTIONS.items()},
    **{f"{name} of large images": (build, lambda: images(4, 80)) for name, build in CONVOLUTIONS.items()},
    "layer norm": (lambda: nn.LayerNorm(6), tokens),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((5, 6)), tokens),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), tokens),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: images(4)),
    "token": (Token, tokens),
}


def apart(net, clients=K):
    """Networks that differ, and their weights (K, *shape)."""
    nets = [copy.deepcopy(net) for _ in range(clients)]
    for other in nets:
        for parameter in other.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    rows = {name: torch.stack([n.get_parameter(name).detach() for n in nets]) for name, _ in net.named_parameters()}
    return nets, {name: row.requires_grad_() for name, row in rows.items()}


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_equals_one_client_after_the_other(name):
    build, draw = LAYERS[name]
    torch.manual_seed(0)
    net, x = nn.Sequential(build()).double(), draw()
    assert (x.nbytes > CACHE) == name.endswith("large images")
    nets, rows = apart(net)
    singles = [n(sample) for n, sample in zip(nets, x, strict=True)]
    found = Stacked(net, rows)(x.flatten(0, 1)).unflatten(0, (K, B))
    torch.testing.assert_close(found, torch.stack(singles), rtol=0, atol=1e-12)
    slope = torch.randn_like(found)
    gradients = torch.autograd.grad(found, list(rows.values()), slope)
    for k, single in enumerate(singles):
        for row, one in zip(gradients, torch.autograd.grad(single, list(nets[k].parameters()), slope[k]), strict=True):
            torch.testing.assert_close(row[k], one, rtol=0, atol=1e-11)


def test_the_network_itself_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(6, 6), Token()).double()
    before, x = net(tokens()[0]), tokens()
    Stacked(net, apart(net)[1])(x.flatten(0, 1))
    assert not [module for module in net.modules() if {"forward", "token"} & module.__dict__.keys()]
    torch.manual_seed(0)
    assert net(x[0]).shape == before.shape


NETS = {
    "mlp": (lambda: mlp(64, 16, 10), (1, 8, 8)),
    "conv": (lambda: conv(10, 1), (1, 8, 8)),
    "vit_digits": (vit_digits, (1, 8, 8)),
    "resnet18_gn": (lambda: resnet18_gn(10, 3), (3, 16, 16)),
}


@pytest.mark.parametrize("name", list(NETS))
def test_every_net_that_can_be_stacked_needs_no_vmap(name):
    build, shape = NETS[name]
    net = build()
    assert stacks(net, [n for n, _ in net.named_parameters()], torch.randn(2, *shape))


class Reaches(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return F.linear(self.one(x.flatten(1)), self.two.weight, self.two.bias)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.out(self.two(self.one(x.flatten(1))))


class Scaled(nn.Module):
    """Has a weight of its own, of no kind of layer."""

    def __init__(self):
        super().__init__()
        self.gamma, self.out = nn.Parameter(torch.rand(12)), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(x.flatten(1) * self.gamma)


ODD = {"reaches into a layer": Reaches, "tied": Tied, "a weight of no layer": Scaled}


class Doubled(ClientModule):
    """A loss of one's own may look at the whole batch of a client."""

    def losses(self, forward, x, y):
        own = F.cross_entropy(forward(x), y, reduction="none")
        return own + own.mean()


def test_a_loss_of_ones_own_sees_one_clients_batch(tmp_path):
    rows = []
    for cohort in (1, 3):
        small = Small(small_net(), small_data(), uneven_parts(), cohort=cohort, client=Doubled, count=6)
        rows.append(small.fit(2, tmp_path).row)
        assert cohort == 1 or small.module.clients.rows.stacked is None
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list(ODD))
def test_what_has_no_stacked_form_trains_all_the_same(name, tmp_path):
    torch.manual_seed(0)
    net = ODD[name]().double()
    assert not stacks(net, [n for n, _ in net.named_parameters()], torch.randn(2, 1, 3, 4, dtype=torch.float64))
    rows = []
    for cohort in (1, 3):
        small = Small(copy.deepcopy(net), small_data(), uneven_parts(), cohort=cohort)
        rows.append(small.fit(2, tmp_path).row)
        assert cohort == 1 or small.module.clients.rows.stacked is None
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-9)


def test_a_stacked_cohort_differentiates_what_trains_only(tmp_path):
    net = small_net()
    space = ParamSpace.of(net)
    small = Small(net, small_data(), uneven_parts(), cohort=3, mask=space.where("3.*"))
    small.fit(1, tmp_path)
    rows = small.module.clients.rows
    assert rows.stacked is not None
    assert [name for name, leaf in rows.leaves.items() if leaf.requires_grad] == ["3.weight", "3.bias"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_the_gradient_of_trained_units_only(bias):
    torch.manual_seed(0)
    net, x, units = nn.Sequential(nn.Linear(6, 9, bias=bias)).double(), tokens(), torch.tensor([1, 4, 5])
    nets, rows = apart(net)
    flops, gradients = [], []
    for chosen in (None, {"0.weight": units}):
        with FlopCounterMode(display=False) as counter:
            found = Stacked(net, rows, units=chosen)(x.flatten(0, 1))
            gradients.append(torch.autograd.grad(found.square().sum(), list(rows.values())))
        flops.append(counter.get_total_flops())
    forward = 2 * K * B * 5 * 6 * 9
    assert flops == [2 * forward, forward + forward * 3 // 9]  # three of nine units; the inputs take no gradient
    every, some = gradients
    torch.testing.assert_close(some[0][:, units], every[0][:, units], rtol=0, atol=1e-12)
    assert float(every[0].abs().sum()) > float(some[0].abs().sum())
    assert float(some[0][:, [0, 2, 3, 6, 7, 8]].abs().sum()) == 0
    if bias:
        torch.testing.assert_close(some[1], every[1], rtol=0, atol=1e-12)


def test_a_stacked_cohort_that_trains_units_computes_no_others(tmp_path):
    net = small_net()
    small = Small(net, small_data(), uneven_parts(), cohort=3, mask=unit_mask(net))
    small.fit(1, tmp_path)
    units = small.module.clients.rows.units
    assert {name: trained.tolist() for name, trained in units.items()} == {"1.weight": [2, 3, 4, 5, 6]}


def test_trying_out_moves_no_random_stream_and_no_mode():
    net = vit_digits().train()
    state = torch.get_rng_state()
    stacks(net, ["head.weight"], torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())


# auto


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 0.99, 4: 1.2}, 1),  # no clear gain: one client needs least memory
        ({1: 1.0, 2: 0.5, 4: 0.4, 8: 0.6}, 4),
        ({1: 1.0, 2: 1.1, 4: 0.5}, 4),
    ],
)
def test_the_fastest_size_is_chosen_if_it_is_clearly_faster(seconds, best):
    assert autotune.choose(seconds) == best


def trial(size):
    return Small(small_net(), small_data(), uneven_parts(), cohort=size, count=size).module.form()


def a_batch():
    data = small_data().train
    return data.x[:8], data.y[:8]


def test_sizes_are_tried_until_the_clients_of_a_round():
    assert list(autotune.measure(trial, a_batch(), clients=6, budget=30.0)) == [1, 2, 4, 6]


def test_a_size_that_would_not_fit_is_not_tried(monkeypatch):
    needed = autotune.client_bytes(trial(1), a_batch())
    monkeypatch.setattr(autotune, "free_memory", lambda device: 2 * 4 * needed)  # half of it: four clients
    assert list(autotune.measure(trial, a_batch(), clients=6, budget=30.0)) == [1, 2, 4]


def test_the_bytes_of_a_client_are_its_rows_and_what_the_backward_needs():
    clients = trial(1)
    row, (x, y) = clients.theta.nbytes, a_batch()
    hidden = 8 * 16 * 8  # eight samples, sixteen units, eight bytes: tanh keeps its output
    assert 4 * row + hidden <= autotune.client_bytes(clients, (x, y)) <= 4 * row + 4 * hidden


def test_the_seconds_of_a_client_are_the_median_of_steps_after_the_first(monkeypatch):
    """A clock that only steps move: 9 s for the first, then 1, 5, 1, 5, ... s; a cohort shares them."""
    clock, clients = [0.0], trial(2)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    taken = []

    def step(x, y, count, term):
        taken.append((x.shape[:2], count))
        clock[0] += 9.0 if len(taken) == 1 else 1.0 + 4 * (len(taken) % 2)
        return torch.zeros(2)

    clients.step = step
    assert autotune._seconds(clients, a_batch(), 2, budget=11.0) == (1 + 5) / 2 / 2
    assert taken == [((2, 8), (8, 8))] * 5  # the first, and 1 + 5 + 1 + 5 s
    clock[0] = 0.0
    taken.clear()
    assert autotune._seconds(clients, a_batch(), 2, budget=1e9) == (1 + 5) / 2 / 2
    assert len(taken) == 51


def test_a_size_takes_a_quarter_of_the_time_that_is_left(monkeypatch):
    """A clock that every look at it moves by 1 s: a step takes 2 s, of which 1 is measured, whatever the size.

    30 steps of one client leave 59 s, 15 of two 28 s, and 7 of four 13 s, of which three steps of six may take 4.5. Had
    the steps of four taken 8 s, they might take 36.
    """
    monkeypatch.setattr(autotune.time, "perf_counter", itertools.count().__next__)
    assert list(autotune.measure(trial, a_batch(), clients=6, budget=121)) == [1, 2, 4, 6]


@pytest.mark.parametrize(("fit", "size"), [(0.5, 1), (1, 1), (3, 2), (5.9, 4), (6, 6), (100, 6)])
def test_on_a_gpu_as_many_as_fit_in_half_of_the_memory_train_together(monkeypatch, fit, size):
    needed = autotune.client_bytes(trial(1), a_batch())
    monkeypatch.setattr(autotune, "free_memory", lambda device: 2 * fit * needed)
    assert autotune.largest(trial, a_batch(), clients=6) == size


def test_without_time_one_client_is_measured():
    assert list(autotune.measure(trial, a_batch(), clients=6, budget=0.0)) == [1]


def test_a_resumed_run_keeps_the_size_that_it_began_with(run_in, monkeypatch):
    from fedsparse import run
    from fedsparse.job import cohorts

    monkeypatch.setattr(cohorts, "measure", lambda *_: {1: 1.0, 5: 0.2})
    options = ["model=mlp", "federation.cohort=auto"]
    whole, _ = run_in("whole", *options, "federation.rounds=4")
    _, folder = run_in("stopped", *options, "federation.rounds=2")
    monkeypatch.setattr(cohorts, "measure", lambda *_: {1: 1.0, 5: 2.0})
    resumed = run([f"resume={folder}", "federation.rounds=4"])
    assert resumed["cohort"] == whole["cohort"] == 5
    assert resumed["global_sha256"] == whole["global_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("cohort", [1, 3])
def test_a_compiled_step_changes_no_result_and_compiles_once(tmp_path, cohort, units):
    from torch._dynamo.utils import counters

    options = {"cohort": cohort, "count": 6, "mask": unit_mask(small_net()) if units else None}
    plain = Small(small_net(), small_data(), uneven_parts(), **options).fit(3, tmp_path).row
    graphs = []
    counting = lightning.pytorch.callbacks.LambdaCallback(
        on_train_epoch_end=lambda *_: graphs.append(counters["stats"]["unique_graphs"])
    )
    torch._dynamo.reset()
    counters.clear()
    again = Small(small_net(), small_data(), uneven_parts(), compile=True, callbacks=[counting], **options)
    torch.testing.assert_close(again.fit(3, tmp_path).row, plain, rtol=0, atol=1e-9)
    assert graphs == [1, 1, 1]
