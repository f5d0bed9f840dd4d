"""A row of small tensors is stepped whole, and one of large tensors in blocks: both give the same model."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts
from test_play import played
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.bound import BoundRow
from fedsparse.federation.client.drift import FedProx, NoCorrection, Scaffold
from fedsparse.federation.client.whole import WholeRow, chosen, direct, public
from fedsparse.optim.adam import SparseAdam
from fedsparse.simulation.module import ClientModule

OBJECTIVES = {"none": NoCorrection, "fedprox": partial(FedProx, mu=0.1), "scaffold": partial(Scaffold, num_clients=7)}
WORK = {"full": LocalWork(2, 3, None), "ragged": LocalWork(8, None, 2)}


class Tied(nn.Module):
    """A layer that is used twice, one that is used not at all, and statistics of a BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.unused, self.out = nn.Linear(12, 12), nn.Linear(2, 2), nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return self.out(self.norm(self.twice(torch.tanh(self.twice(x.flatten(1))))))


def random_mask(net):
    size = ParamSpace.of(net).size
    return torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.4


def one_tensor(net):
    return ParamSpace.of(net).where("*weight")


MASKS = {"all": lambda net: None, "random": random_mask, "weights": one_tensor}
NETS = {"small": small_net, "float32": partial(small_net, torch.float32), "tied": lambda: Tied().double()}


@pytest.mark.parametrize(
    ("net", "mask", "objective", "work", "clip"),
    list(product(NETS, MASKS, OBJECTIVES, WORK, [None, 0.5])),
)
def test_bits_of_a_row_in_blocks(net, mask, objective, work, clip):
    def federation(large):
        made = NETS[net]()
        data = small_data(dtype=torch.float32 if net == "float32" else torch.float64)
        options = {"work": WORK[work], "mask": MASKS[mask](made), "objective": OBJECTIVES[objective], "clip": clip}
        client = partial(ClientModule, large=large)
        return played(Small(made, data, uneven_parts(), client=client, weight_decay=0.01, **options), 2)

    whole, blocks = federation(1000), federation(1)
    assert isinstance(whole.clients.rows, WholeRow)
    assert isinstance(blocks.clients.rows, BoundRow)
    for name, a, b in (
        ("rows", whole.server.rows, blocks.server.rows),
        ("buffers", whole.buffers.values, blocks.buffers.values),
    ):
        # the norm of a whole row is rounded once, and that of blocks block by block
        same = torch.equal(a, b) if clip is None else torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert same, name


def test_bits_with_another_optimizer():
    def row(large):
        options = {
            "make": partial(SparseAdam, weight_decay=0.01),
            "client": partial(ClientModule, large=large),
            "lr": 0.01,
        }
        small = Small(small_net(), small_data(), uneven_parts(), **options)
        return played(small, 2).server.rows

    assert torch.equal(row(1000), row(1))


def example():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(6, 5)
    unused = nn.Parameter(torch.ones(3))
    leaves = [*net.parameters(), unused]
    return net(x).squeeze(1).square(), leaves, torch.full((6,), 1 / 6)


def test_the_engine_gives_what_torch_gives():
    net_loss, leaves, weight = example()
    (net_loss * weight).sum().backward(retain_graph=True)
    wanted = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for compute in (public, direct):
        losses, again, weight = example()
        found = compute(losses, again, weight)
        assert len(found) == len(wanted)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, wanted, strict=True))
        assert all(leaf.grad is None for leaf in again)  # nothing is added to them


def missing(*_):
    raise AttributeError("no engine")


def changed(*_):
    raise TypeError("another signature")


@pytest.mark.parametrize(
    "candidate", [missing, changed, lambda losses, leaves, weight: [weight, weight], lambda *_: []]
)
def test_another_engine_is_not_called(candidate):
    assert chosen(candidate) is public


def test_this_engine_is_called():
    assert chosen() is direct
