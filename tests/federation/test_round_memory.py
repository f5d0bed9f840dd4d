"""Rows that are alive while a round runs, counted, beside those of a hand-written loop."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsparse.bench.loop import HandWritten
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import CHUNK, Subspace
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.client.training import Clients
from fedsparse.federation.exchange.exchange import Full
from fedsparse.federation.federation import Federation
from fedsparse.federation.round import play
from fedsparse.federation.server.aggregation import Change, WeightedMean
from fedsparse.federation.server.server import Server
from fedsparse.federation.watcher import Watcher
from fedsparse.optim import SparseSGDM

WIDTH, CLIENTS, STEPS, BATCH, ROUNDS = 256, 3, 2, 4, 3


def wide_net():
    """Two layers with a unit that is dead: its weights rest in every round."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    net[0].bias.data[3] = -1e3
    return net


def memories():
    """Size of each large memory that tensors have, gradients included, by its address."""
    found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    found += [item.grad for item in found if item.is_leaf and item.grad is not None]
    storages = [item.untyped_storage() for item in found if item.device.type == "cpu"]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() >= WIDTH * WIDTH // 2}


class Alive(Watcher):
    """Counts the rows that are alive and were not at the start, in rows of float32, once for each place.

    A walk over all objects takes a while, so that only the last time counts that a place is expected.
    """

    def __init__(self, size, times):
        self.size, self.before, self.times, self.rows = 4 * size, set(memories()), dict(times), {}

    def count(self, place, *ignored):
        self.times[place] -= 1
        if self.times[place] == 0:
            taken = sum(size for address, size in memories().items() if address not in self.before)
            self.rows[place] = taken / self.size

    def receive(self, round, trained, received):
        self.count("receive")

    def step(self, round):
        self.count("step")

    def close(self, round, reports, change):
        self.count("close")


def rows_of_the_loop(batches, size):
    alive, net = Alive(size, {"backward": CLIENTS * STEPS}), wide_net()
    net[0].weight.register_post_accumulate_grad_hook(partial(alive.count, "backward"))
    hand = HandWritten(net, {"fused": True})
    hand.round(batches)
    return alive.rows["backward"]


def test_a_round_keeps_few_rows_more_than_a_loop():
    """The loop: weights, start, sum, momentum and gradients. Here: a change, and the sum in float64 takes two.

    Small gradients have places in a row of their own, most of which is never written where gradients are large. Beside
    the rows there are masks of a byte a coordinate.
    """
    g = torch.Generator().manual_seed(0)
    samples = CLIENTS * STEPS * BATCH
    x, y = torch.randn(samples, WIDTH, generator=g), torch.randint(4, (samples,), generator=g)
    size = ParamSpace.of(wide_net()).size
    pairs = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    loop = rows_of_the_loop([pairs[at : at + STEPS] for at in range(0, len(pairs), STEPS)], size)
    assert loop == pytest.approx(5, abs=0.1)
    each = CLIENTS * ROUNDS
    alive = Alive(size, {"backward": each * STEPS, "receive": each, "step": ROUNDS, "close": ROUNDS})
    net = wide_net()
    space, mask = ParamSpace.of(net), torch.ones(size, dtype=torch.bool)

    def losses(forward, x, y):
        return F.cross_entropy(forward(x), y, reduction="none")

    def fetch(cohort):
        return x[cohort.samples], y[cohort.samples]

    clients = Clients(net, space, mask, partial(SparseSGDM, lr=0.1), losses, fetch, large=1024)
    net[0].weight.register_post_accumulate_grad_hook(partial(alive.count, "backward"))
    federation = Federation(clients, Full(mask, space.local, space=space), WeightedMean(), watchers=[alive])
    parts = list(torch.arange(samples).view(CLIENTS, -1).numpy())
    plan = RoundPlan(parts, LocalWork(BATCH, STEPS), lambda _: range(CLIENTS), 1)
    for number in range(ROUNDS):
        play(federation, clients, plan.cohorts(number), number)
    (downlink,) = federation.bytes.downlinks
    assert 0 < len(downlink.resting) < size / 8
    masks = 3 / 4
    assert alive.rows["backward"] <= loop + 2 + 1 + masks + 0.1
    assert alive.rows["receive"] <= loop + 2 + masks + 0.1  # without gradients
    assert max(alive.rows["step"], alive.rows["close"]) <= loop + 3 + masks + 0.1  # and the row before the step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_server_rounds_the_change_within_its_own_memory(dtype):
    """Of three groups, the second of which nobody sent to, over the bounds of chunks."""
    g, n = torch.Generator().manual_seed(0), CHUNK + 77
    rows = torch.randn(3, n, generator=g, dtype=torch.float64)
    rows[1] = 0.0
    wanted, place = rows.to(dtype), rows.data_ptr()
    start = torch.randn(3, n, generator=g).to(dtype)
    server = Server(start.clone(), partial(torch.optim.SGD, lr=1.0), Subspace(torch.ones(n, dtype=torch.bool)))
    change = server.step(Change(rows, torch.zeros(3, 0), None, 0.0, (True, False, True)))
    assert torch.equal(change.rows, wanted)
    assert change.rows.data_ptr() == place
    for group in (0, 2):
        assert torch.equal(server.rows[group], start[group] + wanted[group])
    assert torch.equal(server.rows[1], start[1])


def test_rows_that_are_not_one_piece_of_memory_are_copied():
    rows = torch.randn(2, 12, dtype=torch.float64)
    server = Server(torch.zeros(2, 7), partial(torch.optim.SGD, lr=1.0), Subspace(torch.ones(7, dtype=torch.bool)))
    kept = rows.clone()
    change = server.step(Change(rows[:, :7], torch.zeros(2, 0), None, 0.0, (True, True)))
    assert torch.equal(rows, kept)
    assert torch.equal(change.rows, kept[:, :7].float())
    assert torch.equal(server.rows, kept[:, :7].float())
