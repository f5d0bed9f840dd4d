"""Where a mask lets a tensor train: every coordinate once, in the coarsest pieces, and nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace, narrow
from fedsparse.models.units import compute_all_units, compute_units_only, linear_layers
from fedsparse.optim.index import TrainedIndex, blocks

SPACE = ParamSpace(["a.weight", "a.bias", "b.weight"], [torch.Size([4, 6]), torch.Size([4]), torch.Size([5, 2, 2])])


def kinds(mask, large):
    return [(p.name, None if p.mask is None else p.mask.dim()) for p in blocks(SPACE, mask, large)]


def test_pieces_by_hand():
    mask = torch.zeros(SPACE.size, dtype=torch.bool)
    a, bias, b = SPACE.unflatten(mask).values()
    assert kinds(mask, 20) == []  # the bias is small
    a[1:3], b[:] = True, True
    assert kinds(mask, 20) == [("a.weight", 2), ("b.weight", None)]
    bias[0] = True
    assert kinds(mask, 20) == [("a.weight", 2), ("b.weight", None), ("", 1)]
    a[:], bias[:] = False, True
    assert kinds(mask, 20) == [("b.weight", None), ("", 1)]
    assert kinds(mask, 25) == [("", 1)]
    assert kinds(torch.ones_like(mask), 25) == [("", None)]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=13, max_size=13), st.integers(0, 9), st.sampled_from([0.0, 0.1]))
def test_every_trained_coordinate_is_in_exactly_one_piece(units, seed, noise):
    marks = torch.tensor(units)
    mask = torch.cat([marks[:4].repeat_interleave(6), marks[4:8], marks[8:].repeat_interleave(4)])
    mask ^= torch.rand(SPACE.size, generator=torch.Generator().manual_seed(seed)) < noise
    counted = torch.zeros(SPACE.size)
    for block in blocks(SPACE, mask, large=1):
        view = block.of(counted)
        view += 1 if block.mask is None else block.mask
    assert torch.equal(counted, mask.float())


UNITS = torch.tensor([[False] * 3, [True] * 3, [False] * 3, [True] * 3])


@pytest.mark.parametrize(
    ("mask", "shape", "dim", "index", "of_clients"),
    [
        # rows of clients whose numbers are 0, 10, 20 and 30, laid beside what trains
        (UNITS, (4, 3), 0, [1, 3], [[10.0], [30.0]]),
        (UNITS | torch.eye(4, 3).bool(), (12,), 0, [0, 3, 4, 5, 8, 9, 10, 11], [0.0, *[10.0] * 3, 20.0, *[30.0] * 3]),
        (torch.tensor([True, False, True]).expand(4, 3), (4, 3), 1, [0, 2], [[0.0], [10.0], [20.0], [30.0]]),
        (torch.tensor([True, False, True]).expand(4, 3)[:1], (3,), 0, [0, 2], [0.0, 0.0]),  # nobody shares it
        (torch.tensor([True, False, True]).expand(2, 3), (2, 3), 1, [0, 2], [[0.0], [10.0]]),
        (torch.tensor([True, False, False, True]), (4,), 0, [0, 3], [0.0, 30.0]),
    ],
    ids=["units", "coordinates", "one row for all", "one row of one", "one row for two", "a vector"],
)
def test_the_coarsest_entries_that_a_mask_does_not_cut_by_hand(mask, shape, dim, index, of_clients):
    place = TrainedIndex.of(mask, torch.zeros(mask.shape))
    assert (place.shape, place.dim, place.positions.tolist(), place.positions.dtype) == (shape, dim, index, torch.int32)
    assert place.numel == int(mask.sum())
    values = torch.tensor([0.0, 10.0, 20.0, 30.0])[: len(mask)]
    assert place.of_clients(values, place.positions).tolist() == of_clients


@pytest.mark.parametrize(
    ("total", "dtype"), [(1, torch.int32), (2**31 - 1, torch.int32), (2**31, torch.int64), (2**32, torch.int64)]
)
def test_positions_take_four_bytes_where_their_number_fits_into_them(total, dtype):
    """The number itself too: it ends the last client's share."""
    index = narrow(torch.tensor([0, total - 1]), total)
    assert index.tolist() == [0, total - 1]
    assert index.dtype == dtype


def test_coordinates_are_gathered_and_put_back():
    mask = torch.arange(10) % 3 == 0
    rows, some = torch.randn(2, 10), Subspace(mask)
    assert torch.equal(some.of(rows), rows[:, mask])
    before = rows.clone()
    some.write(rows, torch.ones(2, 4))
    assert torch.equal(rows, torch.where(mask, 1.0, before))
    some.write(rows[1], torch.zeros(4))  # one row alone
    assert torch.equal(rows[1], torch.where(mask, 0.0, before[1]))
    every = Subspace(torch.ones(10, dtype=torch.bool))
    assert every.of(rows) is rows
    assert (some.size, every.size, some.index.dtype) == (4, 10, torch.int32)


# ---- linear layers that differentiate some units only


def a_net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3)).double()


UNITS = {"0.weight": torch.tensor([1, 4, 6]), "2.weight": torch.tensor([0])}


def with_units(net):
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    compute_units_only(net, UNITS)
    return net


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,)])
def test_gradients_of_units_equal_the_full_ones(bias, shape):
    full, some = a_net(bias), with_units(a_net(bias))
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in range(2)]
    inputs = [x.detach().requires_grad_() for x in (inputs[0], inputs[0])]
    for net, x in zip((full, some), inputs, strict=True):
        for _ in range(2):  # gradients add up
            net(x).pow(2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, p), q in zip(full.named_parameters(), some.parameters(), strict=True):
        expected = p.grad
        if name in UNITS:
            expected = torch.zeros_like(p).index_copy_(0, UNITS[name], p.grad[UNITS[name]])
        torch.testing.assert_close(q.grad, expected, rtol=0, atol=1e-12)


def test_the_weight_gradient_costs_as_many_products_as_units_train():
    net = with_units(a_net())
    x = torch.randn(8, 5, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    forward, back = 2 * 8 * (5 * 7 + 7 * 3), 2 * 8 * 7 * 3
    assert counter.get_total_flops() == forward + back + 2 * 8 * (3 * 5 + 1 * 7)


def test_without_gradients_and_afterwards_the_layer_is_as_it_was():
    net, twin = with_units(a_net()), a_net()
    x = torch.randn(8, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(net(x), twin(x))
    compute_all_units(net)
    net.zero_grad()
    net(x).sum().backward()
    twin(x).sum().backward()
    assert torch.equal(net[0].weight.grad, twin[0].weight.grad)


def test_half_precision_trains_the_same_units():
    full, some = a_net().float(), a_net().float()
    some = with_units(some)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for net in (full, some):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            loss = net(x).float().pow(2).sum()
        loss.backward()
    units = UNITS["0.weight"]
    torch.testing.assert_close(some[0].weight.grad[units], full[0].weight.grad[units], rtol=2e-2, atol=2e-2)
    assert some[0].weight.grad.dtype == torch.float32


def test_only_plain_linear_layers_are_changed():
    attention = nn.MultiheadAttention(4, 2)
    net = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "attention": attention, "fc": nn.Linear(2, 2)})
    names = [name for name, p in net.named_parameters() if p.dim() > 1]
    assert list(linear_layers(net, names)) == ["fc.weight"]
    assert copy.deepcopy(net).fc.weight.shape == (2, 2)
