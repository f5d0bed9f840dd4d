"""Layers and networks with the weights of several clients against one client after the other."""

from __future__ import annotations

import copy

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


def test_sizes_that_would_not_fit_together_are_not_tried(monkeypatch):
    needed = autotune.client_bytes(trial(1), a_batch())
    for clients, sizes in ((7, [1, 2, 4]), (6, [1, 2])):
        monkeypatch.setattr(autotune, "free_memory", lambda device, fit=clients: 2 * fit * needed)  # half of it
        assert list(autotune.measure(trial, a_batch(), clients=6, budget=30.0)) == sizes


def test_the_bytes_of_a_client_are_its_rows_and_what_the_backward_needs():
    clients = trial(1)
    row, (x, y) = clients.theta.nbytes, a_batch()
    hidden = 8 * 16 * 8  # eight samples, sixteen units, eight bytes: tanh keeps its output
    assert 4 * row + hidden <= autotune.client_bytes(clients, (x, y)) <= 4 * row + 4 * hidden


class Paced:
    """A clock that only steps move: ``seconds(size, n)`` for the n-th step of a size; and who took steps."""

    def __init__(self, seconds, monkeypatch):
        self.seconds, self.now, self.taken = seconds, 0.0, []
        monkeypatch.setattr(autotune.time, "thread_time", lambda: self.now)

    def make(self, size):
        def step(x, y, count, term):
            assert (x.shape[:2], count) == ((8, 1) if size == 1 else (size, 8), (8,) * size)
            self.taken.append(size)
            self.now += self.seconds(size, self.taken.count(size))
            return torch.zeros(size)

        clients = trial(size)
        clients.step = step
        return clients

    def measured(self, budget):
        return autotune.measure(self.make, a_batch(), clients=6, budget=budget)


def test_sizes_take_turns_after_a_first_step_that_does_not_count(monkeypatch):
    """Every third turn of each size takes five times as long; the first step of size 1 is that of its memory."""
    paced = Paced(lambda size, n: 1e3 if n == 1 else size * (5.0 if n % 3 == 0 else 1.0), monkeypatch)
    assert paced.measured(1e5) == {1: 1.0, 2: 1.0, 4: 1.0, 6: 1.0}
    assert paced.taken == [1, 1, 1, 2, 2, 4, 4, 6, 6, *[1, 2, 4, 6] * (autotune.MOST - 1)]


def test_one_slow_step_decides_nothing(monkeypatch):
    """Four clients are the fastest, and one of their steps takes a hundred times as long."""
    usual = {1: 1.0, 2: 2.0, 4: 2.0, 6: 6.0}
    for slow in (3, 4):
        paced = Paced(lambda size, n, slow=slow: usual[size] * (100 if (size, n) == (4, slow) else 1), monkeypatch)
        assert autotune.choose(paced.measured(400.0)) == 4


def test_a_machine_that_slows_down_slows_all_sizes(monkeypatch):
    """From half of the turns on everything takes three times as long, and a hundredth more each turn."""
    paced = Paced(lambda size, n: size * (0.9 if size == 4 else 1.0) * (1 if n < 20 else 3 + n / 100), monkeypatch)
    found = paced.measured(1e4)
    assert autotune.choose(found) == 4
    assert found[6] / found[2] == pytest.approx(1.0, abs=0.01)
    assert found[4] / found[2] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("budget", [0, 5, 11, 20, 40, 54, 90])
def test_the_budget_holds_and_every_size_but_a_lone_one_is_measured_three_times(monkeypatch, budget):
    paced = Paced(lambda size, n: float(size), monkeypatch)
    found = paced.measured(budget)
    assert paced.now <= max(budget, 3)  # of one client: its memory, a first step, and one that counts
    counted = {size: paced.taken.count(size) - (2 if size == 1 else 1) for size in found}
    assert counted == {1: 1} or min(counted.values()) >= autotune.TURNS
    assert len(found) == sum(budget >= least for least in (0, 15, 35, 67)), (paced.now, list(found))


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
