"""Which local training is carried out, captured and replayed; and on a GPU, that a replay has the bits of the steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from composed import composed
from small import small_data, uneven_parts
from torch import nn
from torch.nn import functional as F

from fedsparse.bench.gpu.cases import small
from fedsparse.bench.gpu.federations import alone
from fedsparse.core.space import ParamSpace
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.client.graphs import MOST, Graphs, capture
from fedsparse.federation.client.training import Clients
from fedsparse.federation.exchange.update import Start
from fedsparse.job.assemble import assemble
from fedsparse.optim import SparseSGDM

X, Y = torch.ones(2, 3), torch.zeros(2)


@dataclass
class Fake:
    """A graph that says that it was replayed."""

    name: str

    def replay(self, x, y):
        return (f"replayed {self.name}",)


class Story:
    """Notes what was done, in order; captures fail where it is told so."""

    def __init__(self, fails=False):
        self.told, self.fails = [], fails
        self.graphs = Graphs(self.capture)

    def capture(self, train, restart, x, y):
        self.told.append("captured")
        if self.fails:
            raise RuntimeError("operation not permitted\nmore lines")
        return Fake(str(self.told.count("captured")))

    def run(self, x=X, kind="kind"):
        def train(x, y):
            self.told.append("trained")
            return ("trained",)

        return self.graphs.run(train, lambda: lambda: self.told.append("restarted"), x, Y, kind)[0]


def test_the_first_is_captured_and_all_are_replayed():
    story = Story()
    assert [story.run() for _ in range(3)] == ["replayed 1"] * 3
    assert story.told == ["captured", "restarted"]


@pytest.mark.parametrize("other", [{"kind": "another"}, {"x": torch.ones(3, 3)}, {"x": X.double()}], ids=str)
def test_another_kind_or_shape_or_type_has_a_graph_of_its_own(other):
    story = Story()
    assert [story.run(), story.run(**other), story.run()] == ["replayed 1", "replayed 2", "replayed 1"]


def test_what_cannot_be_captured_starts_again_and_is_not_tried_again():
    story = Story(fails=True)
    assert [story.run() for _ in range(3)] == ["trained"] * 3
    assert story.told == ["captured", "restarted", "trained", "trained", "trained"]


def test_only_a_few_graphs_are_kept():
    story = Story()
    found = [story.run(kind=kind) for kind in range(MOST + 1)]
    assert found == [*(f"replayed {place + 1}" for place in range(MOST)), "trained"]


@dataclass
class Rehearsed:
    """Stands for a captured training on a CPU: it carries out what a graph would launch."""

    train: Callable

    def replay(self, x, y):
        return self.train(x, y)


def rehearse(train, restart, x, y):
    """Do to the clients what a capture does before it begins."""
    for _ in range(2):
        train(x.clone(), y.clone())
        restart()
    return Rehearsed(train)


def half_way(train, restart, x, y):
    """Fail as a capture does: what the host did in it stays done."""
    rehearse(train, restart, x, y)
    train(x, y)
    raise RuntimeError("operation not permitted")


def noisy_net():
    torch.manual_seed(0)
    first = [nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*first, nn.Linear(16, 3)).double().train()


def trained(capture):
    """Train three clients after one another: their updates, and the network that they leave."""
    net = noisy_net()
    space, split = ParamSpace.of(net), small_data().train
    mask = torch.rand(space.size, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = RoundPlan(uneven_parts(), LocalWork(8, steps=3), lambda _: range(3))
    clients = Clients(
        net,
        space,
        mask,
        partial(SparseSGDM, lr=0.5, momentum=0.9, dampening=0.3),
        lambda forward, x, y: F.cross_entropy(forward(x), y, reduction="none"),
        lambda cohort: (split.x[cohort.samples], split.y[cohort.samples]),
        clip_norm=0.1,
    )
    if capture is not None:
        clients.graphs = Graphs(capture)
    start = Start(clients.subspace.of(clients.theta.detach()).clone(), 0.5, (0,))
    updates = [clients.train(start, cohort) for cohort in plan.cohorts(0)]
    return [(u.loss, u.clipped, u.buffers.tolist(), u.values.tolist()) for u in updates], net.state_dict()


@pytest.mark.parametrize("capture", [rehearse, half_way])
def test_what_is_rehearsed_is_undone(capture):
    """Values, momentum and first step, dropout, running statistics with their counter, and clipped steps."""
    plain, net = trained(None)
    found, other = trained(capture)
    assert found == plain
    assert all(clipped for _, clipped, *_ in plain)
    assert net["2.num_batches_tracked"] == 9
    assert all(torch.equal(other[name], value) for name, value in net.items())


def test_a_capture_rehearses_twice_and_looks_for_waits_in_the_second(monkeypatch):
    """CUDA's part is played by what notes when it is called; the mode is restored where the second finds a wait."""
    told, mode = [], ["warn"]

    def switched(to):
        mode[0] = to

    @contextmanager
    def captured(graph, capture_error_mode):
        told.append(f"begin {capture_error_mode}")
        yield
        told.append("end")

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switched)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", captured)

    def train(x, y):
        assert x is not X  # a copy, which a replay fills
        told.append(f"train {mode[0]}")
        return (x,)

    found = capture(train, lambda: told.append("restart"), X, Y)
    assert told == ["train warn", "restart", "train error", "restart", "begin thread_local", "train warn", "end"]
    assert found.outputs[0] is found.x
    assert mode == ["warn"]

    def waits(x, y):
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return train(x, y)

    told.clear()
    with pytest.raises(RuntimeError, match="synchronizing"):
        capture(waits, lambda: told.append("restart"), X, Y)
    assert told == ["train warn", "restart"]
    assert mode == ["warn"]


@pytest.mark.parametrize(
    ("options", "graph"),
    [([], True), (["schedule=step"], True), (["schedule=cosine"], False), (["federation.graph=false"], False)],
)
def test_a_run_with_many_learning_rates_has_no_graphs(options, graph):
    assert assemble(composed("model=mlp", *options)).module().graph is graph


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"density": 0.2}, {"cohort": 3}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("model", ["mlp", "vit_digits"])
def test_a_replay_has_the_bits_of_the_steps(model, changes):
    case, device = replace(small(model, 6, 3), **changes), torch.device("cuda")
    replayed, stepped = (alone(replace(case, graph=graph), device).row for graph in (True, False))
    assert torch.equal(replayed, stepped)


class Dropped(nn.Module):
    """A network with dropout; ``waits`` reads a value of the device in its forward."""

    def __init__(self, waits=False):
        super().__init__()
        self.waits = waits
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x):
        return self.layers(2 * x if self.waits and float(x.sum()) > 1e30 else x)


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [False, True])
def test_dropout_draws_the_same_numbers_also_where_nothing_can_be_captured(waits):
    case, device = replace(small("mlp", 6, 3), build=partial(Dropped, waits)), torch.device("cuda")
    replayed, stepped = (alone(replace(case, graph=graph), device).row for graph in (True, False))
    assert torch.equal(replayed, stepped)
