"""Sums and means of a round, by hand: groups that nobody sent to, small weights, rows that do not count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsparse.core.subspace import CHUNK
from fedsparse.federation.exchange.update import Update, finite, subtract
from fedsparse.federation.server import coordinate_mean, krum, median
from fedsparse.federation.server.aggregation import FedNova, Robust, Tally, WeightedMean

CPU = torch.device("cpu")


def update(rows, weight, *, buffers=None, loss=None, steps=(), sent=None, clients=None):
    rows = torch.tensor(rows)
    buffers = torch.zeros(len(rows), 0) if buffers is None else torch.tensor(buffers)
    loss = tuple(loss or [1.0] * len(rows))
    sent = None if sent is None else torch.tensor(sent)
    return Update(tuple(clients or range(len(rows))), rows, buffers, tuple(weight), loss, sent, steps=tuple(steps))


def closed(aggregation, given, group, groups=2, own=False):
    tally = aggregation.zero(groups, given.rows.shape[1], given.buffers.shape[1], CPU, own)
    aggregation.add(tally, given, group)
    return aggregation.finish(aggregation.merge(tally))


@pytest.mark.parametrize("aggregation", [WeightedMean(), Robust(median)], ids=["mean", "median"])
def test_a_group_that_nobody_sent_to_stays_by_hand(aggregation):
    """Weights below 1 count as any other."""
    given = update([[4.0, 8.0], [4.0, 8.0]], [0.25, 0.25], buffers=[[2.0], [6.0]], loss=[1.0, 3.0])
    change = closed(aggregation, given, [0, 0])
    assert change.rows.tolist() == [[4.0, 8.0], [0.0, 0.0]]
    assert change.buffers.tolist() == [[4.0], [0.0]]
    assert change.touched.tolist() == [[True, True], [False, False]]
    assert change.loss == 2.0


def test_each_group_has_its_own_mean_by_hand():
    given = update([[1.0], [2.0], [6.0]], [0.5, 1.0, 3.0], buffers=[[4.0], [1.0], [5.0]], loss=[9.0, 0.0, 3.0])
    change = closed(WeightedMean(), given, [0, 1, 1])
    assert change.rows.tolist() == [[1.0], [5.0]]  # (1 * 2 + 3 * 6) / 4
    assert change.buffers.tolist() == [[4.0], [4.0]]  # (1 * 1 + 3 * 5) / 4
    assert change.touched is None
    assert change.loss == 3.0  # (4.5 + 0 + 9) / 4.5


@pytest.mark.parametrize(("denominator", "wanted"), [("senders", [3.0, 5.0, 0.0]), ("participants", [3.0, 1.25, 0.0])])
def test_coordinates_that_some_sent_by_hand(denominator, wanted):
    given = update([[3.0, 0.0, 0.0], [3.0, 5.0, 0.0]], [0.75, 0.25], sent=[[True, False, False], [True, True, False]])
    change = closed(WeightedMean(denominator), given, [0, 0], own=True)
    assert change.rows.tolist() == [wanted, [0.0] * 3]
    assert change.touched.tolist() == [[True, True, False], [False] * 3]


def test_fednova_by_hand():
    """Each client's change of a step, times the mean number of steps: (1 * 2/2 + 3 * 8/4) / 4 * (1 * 2 + 3 * 4) / 4."""
    change = closed(FedNova(), update([[2.0], [8.0]], [1.0, 3.0], steps=[2.0, 4.0]), [0, 0])
    assert change.rows.tolist() == [[1.75 * 3.5], [0.0]]


@pytest.mark.parametrize("aggregation", [WeightedMean(), FedNova(), Robust(median)], ids=["mean", "nova", "median"])
def test_a_client_of_weight_0_adds_nothing_whatever_it_sends(aggregation):
    given = update(
        [[1.0], [math.nan], [3.0]],
        [1.0, 0.0, 1.0],
        buffers=[[1.0], [math.nan], [5.0]],
        loss=[2.0, math.nan, 4.0],
        steps=[2.0, math.nan, 2.0],
    )
    change = closed(aggregation, given, [0, 0, 0], groups=1)
    assert (change.rows.tolist(), change.buffers.tolist(), change.loss) == ([[2.0]], [[3.0]], 3.0)


@pytest.mark.parametrize("aggregation", [WeightedMean(), FedNova(), Robust(median)], ids=["mean", "nova", "median"])
def test_a_round_in_which_nobody_counts_has_no_change(aggregation):
    assert closed(aggregation, update([[1.0]], [0.0], steps=[1.0]), [0]) is None


@pytest.mark.parametrize("own", [False, True])
def test_what_the_host_summed_travels_with_the_rows_of_all_groups(own, monkeypatch):
    """A stand-in for torch's reduction doubles the vector, as a second process with the same sums would."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda vector: vector.mul_(2))
    tally = Tally(3, 2, 1, CPU, own)
    tally.rows[1, 0], tally.buffers[2, 0] = 5.0, 7.0
    if own:
        tally.senders[0, 1] = 4.0
    tally.weight, tally.steps, tally.loss = [1.0, 2.0, 2.0**24 + 1], [4.0, 5.0, 6.0], 7.0
    tally.all_reduce()
    assert (tally.weight, tally.steps, tally.loss) == ([2.0, 4.0, 2.0**25 + 2], [8.0, 10.0, 12.0], 14.0)
    assert tally.rows.tolist() == [[0.0, 0.0], [10.0, 0.0], [0.0, 0.0]]
    assert tally.buffers.tolist() == [[0.0], [0.0], [14.0]]
    assert (tally.senders.tolist() if own else None) == ([[0.0, 8.0], [0.0, 0.0], [0.0, 0.0]] if own else None)
    assert len(tally.vector) == 3 * 2 + 3 + own * 3 * 2 + 7


def test_sums_are_of_double_precision_by_hand():
    """In float32 the 1 would be lost beside 1e8, and 0.1 / (0.1 + 0.7) be another number."""
    change = closed(WeightedMean(), update([[1e8], [1.0]], [1.0, 1.0]), [0, 0], groups=1)
    assert change.rows.tolist() == [[50_000_000.5]]
    for aggregation in (WeightedMean(), Robust(coordinate_mean)):
        change = closed(aggregation, update([[1.0], [0.0]], [0.1, 0.7]), [0, 0], groups=1)
        assert change.rows.tolist() == [[0.1 / (0.1 + 0.7)]]


def test_a_zero_that_was_sent_counts():
    given = update([[0.0], [0.0], [6.0]], [1.0] * 3, sent=[[True], [True], [True]])
    assert closed(Robust(median), given, [0] * 3, groups=1).rows.tolist() == [[0.0]]
    assert closed(WeightedMean(), given, [0] * 3, groups=1, own=True).rows.tolist() == [[2.0]]


def test_who_sent_what_is_summed_up_only_where_it_is_asked_for():
    given = update([[3.0], [0.0]], [1.0, 2.0], sent=[[True], [False]])
    change = closed(WeightedMean(), given, [0, 0], groups=1)
    assert (change.rows.tolist(), change.touched) == ([[1.0]], None)
    assert WeightedMean().zero(2, 3, 1, CPU).senders is None
    assert Tally(2, 3, 1, CPU).senders is None


def test_rows_are_taken_in_the_order_of_their_clients():
    """All three are one from their nearest, and the least client's wins; it is not the first to come."""
    given = update([[0.0], [1.0], [2.0]], [1.0] * 3, clients=(7, 3, 5))
    assert closed(Robust(lambda *rows: krum(*rows, attackers=0)), given, [0] * 3, groups=1).rows.tolist() == [[1.0]]


def test_another_denominator_is_refused():
    with pytest.raises(ValueError, match="aggregation.denominator is 'everyone'; it must be senders or participants"):
        WeightedMean("everyone")


@pytest.mark.parametrize("rule", [WeightedMean, FedNova])
def test_blocks_are_float32_sums_of_so_many_clients_of_a_group(rule):
    """Of seven clients in cohorts of three, in two groups, beside the same sums in plain numpy."""
    rng, group, n, block = np.random.default_rng(0), [0, 1, 0, 0, 1, 0, 0], 5, 2
    rows, weight = rng.normal(size=(7, n)).astype(np.float32), [3.0, 2.0, 0.0, 1.0, 4.0, 2.5, 1.0]
    steps = rng.integers(1, 9, 7).astype(float).tolist()
    aggregation = rule(block=block)
    tally = aggregation.zero(2, n, 0, CPU)
    for first in range(0, 7, 3):
        part = slice(first, first + 3)
        aggregation.add(tally, update(rows[part], weight[part], steps=steps[part]), group[part])
    found = aggregation.finish(aggregation.merge(tally)).rows
    for g in (0, 1):
        those = [k for k in range(7) if group[k] == g and weight[k] > 0]
        scale = [weight[k] / steps[k] if rule is FedNova else weight[k] for k in those]
        total = np.zeros(n)
        for at in range(0, len(those), block):
            part = np.zeros(n, dtype=np.float32)
            for k, w in zip(those[at : at + block], scale[at : at + block], strict=True):
                part = torch.from_numpy(part).add(torch.from_numpy(rows[k]), alpha=w).numpy()
            total += part
        mean = total / sum(weight[k] for k in those)
        nova = sum(weight[k] * steps[k] for k in those) / sum(weight[k] for k in those)
        assert found[g].tolist() == pytest.approx((mean * nova if rule is FedNova else mean).tolist(), rel=1e-15)


def test_a_block_of_one_is_the_sum_in_float64_and_a_larger_one_is_rounded():
    given = update([[1e8], [1.0]], [1.0, 1.0])
    assert closed(WeightedMean(block=1), given, [0, 0], groups=1).rows.tolist() == [[50_000_000.5]]
    assert closed(WeightedMean(block=2), given, [0, 0], groups=1).rows.tolist() == [[50_000_000.0]]


@pytest.mark.parametrize("block", [0, 1.5, "8", True])
def test_a_block_that_cannot_be_is_refused(block):
    with pytest.raises(ValueError, match="aggregation.block is .*; it must be a whole number"):
        WeightedMean(block=block)


@pytest.mark.parametrize("block", [1, 3])
def test_a_tally_that_starts_again_has_nothing_of_the_round_before(block):
    """Also where that ended with an open block; in the same memory."""
    aggregation, given = WeightedMean(block=block), update([[4.0, 8.0]], [2.0], buffers=[[3.0]], loss=[5.0])
    tally = aggregation.zero(1, 2, 1, CPU)
    aggregation.add(tally, update([[1e6, math.pi]], [7.0], buffers=[[9.0]]), [0])
    place = tally.vector.data_ptr()
    again = tally.restart()
    aggregation.add(again, given, [0])
    change = aggregation.finish(again)
    assert (change.rows.tolist(), change.buffers.tolist(), change.loss) == ([[4.0, 8.0]], [[3.0]], 5.0)
    assert change.rows.data_ptr() == place


def test_rows_that_are_not_finite_leave_the_sum_as_it_was_by_hand():
    """Differences and their sums in chunks: a NaN in the last of three, and finite values whose sum is not."""
    n = 2 * CHUNK + 5
    start, values = torch.zeros(3, n), torch.ones(3, n)
    values[1, -1], values[2] = math.nan, 1e38
    out = torch.empty(3, n)
    sums = subtract(values, start, out)
    assert torch.equal(out[0], values[0])
    assert torch.equal(out[1, :-1], values[1, :-1])
    assert [math.isfinite(value) for value in sums.tolist()] == [True, False, False]
    assert sums[0] == n
    given = finite(Update((0, 1, 2), out, torch.zeros(3, 0), (1.0,) * 3, (1.0,) * 3), sums.tolist())
    assert given.weight == (1.0, 0.0, 1.0)
    change = closed(WeightedMean(), given, [0] * 3, groups=1)
    assert change.rows[0, -1] == pytest.approx(5e37, rel=1e-6)
