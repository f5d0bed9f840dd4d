"""Which local training is carried out, captured and replayed; and on a GPU, that a replay has the bits of the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from fedsparse.bench.gpu.cases import small
from fedsparse.bench.gpu.federations import alone
from fedsparse.federation.client.graphs import MOST, Graphs

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
