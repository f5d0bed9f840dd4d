"""Robust aggregation against numbers worked out by hand, and against plain loops, numpy and scipy on ragged updates.

K clients, P coordinates. The oracles see only the clients that take part, and never a value that was not sent.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import trim_mean
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsparse.federation import server
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.server import robust
from fedsparse.federation.server.robust import (
    coordinate_mean,
    geometric_median,
    krum,
    median,
    multi_krum,
    trimmed_mean,
    weighted_mean,
)

JUNK = 1e6  # stands where a client sent nothing: no rule may look at it
NAN, INF = math.nan, math.inf


# --- cases


def case(rows, weight=None, sent=None, dtype=torch.float64):
    """Values, sent and weight; None in a row is a coordinate that was not sent."""
    told = [[v is not None for v in row] for row in rows] if sent is None else sent
    values = [[JUNK if v is None else v for v in row] for row in rows]
    weight = [1.0] * len(rows) if weight is None else weight
    return (
        torch.tensor(values, dtype=dtype),
        torch.tensor(told, dtype=torch.bool),
        torch.tensor(weight, dtype=torch.float64),
    )


def ragged(seed, clients=9, size=6, dropped=2, density=0.6, dtype=torch.float64):
    """Random updates of which each client sends its own part; some rows have weight 0 and hold NaN or infinity."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(clients, size)) + rng.normal(size=size)
    sent = rng.random((clients, size)) < density
    weight = rng.integers(1, 9, clients).astype(float)
    out = rng.permutation(clients)[:dropped]
    values[~sent] = JUNK
    values[out] = rng.choice([NAN, INF, -INF, 7.0], (dropped, size))
    weight[out] = 0.0
    return torch.tensor(values, dtype=dtype), torch.tensor(sent), torch.tensor(weight)


def taking_part(values, sent, weight):
    """What the oracles see: rows of weight above 0 as numpy, zero where not sent."""
    alive = weight.numpy() > 0
    v, s, w = values.double().numpy()[alive], sent.numpy()[alive], weight.numpy()[alive]
    return np.where(s, v, 0.0), s, w


def columns(reduce, sent):
    """A coordinate after the other, over its senders; 0 and untouched if there are none."""
    mean = [reduce(column, who) if who.any() else 0.0 for column, who in zip(range(sent.shape[1]), sent.T, strict=True)]
    return np.array(mean, dtype=float), sent.any(0)


# --- oracles: each takes what takes part, and returns mean and touched


def plain_weighted_mean(v, s, w):
    mean = [sum(w[k] * v[k][p] for k in range(len(w))) / sum(w) for p in range(v.shape[1])]
    return np.array(mean), s.any(0)


def plain_senders_mean(v, s, w):
    return columns(lambda p, who: np.average(v[who, p], weights=w[who]), s)


def plain_trimmed(trim):
    return lambda v, s, w: columns(lambda p, who: trim_mean(v[who, p], trim), s)


def plain_median(v, s, w):
    return columns(lambda p, who: np.median(v[who, p]), s)


def krum_order(v, attackers):
    """Rows from the best to the worst, ties by index."""
    scores = []
    for i, row in enumerate(v):
        far = sorted(sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) for j, other in enumerate(v) if j != i)
        scores.append(sum(far[: len(v) - attackers - 2]))
    return sorted(range(len(v)), key=lambda i: (scores[i], i))


def plain_krum(attackers):
    def oracle(v, s, w):
        best = krum_order(v, attackers)[0]
        return v[best], s[best]

    return oracle


def plain_multi_krum(attackers, keep=None):
    def oracle(v, s, w):
        kept = krum_order(v, attackers)[: len(v) - attackers if keep is None else keep]
        return plain_senders_mean(v[kept], s[kept], w[kept])

    return oracle


def distance(z, v, w):
    """What a geometric median minimises, and its gradient."""
    away = z - v
    norm = np.sqrt((away**2).sum(1))
    return float(w @ norm), (w / norm) @ away


def a_client_that_is_the_median(v, w):
    """A row from which the others together do not pull as hard as it holds (Kuhn 1973), or None."""
    for row in v:
        away = np.linalg.norm(v - row, axis=1)
        here = away == 0
        pull = (w[~here] / away[~here]) @ (v[~here] - row)
        if np.linalg.norm(pull) <= w[here].sum():
            return row
    return None


def plain_geometric_median(v, s, w):
    if (row := a_client_that_is_the_median(v, w)) is not None:
        return row, s.any(0)
    share = w / w.sum()
    found = minimize(distance, share @ v, (v, share), "BFGS", jac=True, options={"gtol": 1e-10})
    assert np.abs(distance(found.x, v, share)[1]).max() < 1e-7  # it is the minimum
    return found.x, s.any(0)


def with_options(function, **options):
    return lambda values, sent, weight: function(values, sent, weight, **options)


RULES = {
    "weighted mean": (weighted_mean, plain_weighted_mean, 1e-12),
    "mean of senders": (with_options(coordinate_mean, denominator="senders"), plain_senders_mean, 1e-12),
    "mean of participants": (with_options(coordinate_mean, denominator="participants"), plain_weighted_mean, 1e-12),
    "trimmed mean": (trimmed_mean, plain_trimmed(0.2), 1e-12),
    "untrimmed mean": (with_options(trimmed_mean, trim=0.0), plain_trimmed(0.0), 1e-12),
    "trimmed by 0.3": (with_options(trimmed_mean, trim=0.3), plain_trimmed(0.3), 1e-12),
    "trimmed by 0.49": (with_options(trimmed_mean, trim=0.49), plain_trimmed(0.49), 1e-12),
    "median": (median, plain_median, 1e-12),
    "krum": (krum, plain_krum(1), 0.0),
    "krum of 0": (with_options(krum, attackers=0), plain_krum(0), 0.0),
    "krum of 3": (with_options(krum, attackers=3), plain_krum(3), 0.0),
    "multi-krum": (multi_krum, plain_multi_krum(1), 1e-12),
    "multi-krum of 2, 3 kept": (with_options(multi_krum, attackers=2, keep=3), plain_multi_krum(2, 3), 1e-12),
    "multi-krum, 1 kept": (with_options(multi_krum, keep=1), plain_krum(1), 1e-12),
    "geometric median": (geometric_median, plain_geometric_median, 1e-6),
}
# rules that any number of clients will do for
WHATEVER = [name for name in RULES if "krum" not in name]
every_rule = pytest.mark.parametrize("name", list(RULES))
most_rules = pytest.mark.parametrize("name", WHATEVER)


def agree(result, expected, tolerance):
    mean, touched = result
    assert mean.dtype == torch.float64
    assert touched.dtype == torch.bool
    assert mean.shape == touched.shape == expected[0].shape
    assert touched.tolist() == list(expected[1])
    assert mean.numpy() == pytest.approx(np.asarray(expected[0]), rel=tolerance, abs=tolerance)


def same(one, other):
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- against the oracles


@every_rule
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_agrees_with_the_oracle_on_ragged_updates(name, seed, dtype):
    rule, oracle, tolerance = RULES[name]
    clients = 8 + seed % 2  # 6 or 7 take part: middles of even and of odd numbers
    given = ragged(seed, clients=clients, dtype=dtype)
    agree(rule(*given), oracle(*taking_part(*given)), tolerance)


@every_rule
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_it_agrees_with_the_oracle_for_twenty_clients(name, density):
    rule, oracle, tolerance = RULES[name]
    given = ragged(100, clients=20, size=40, dropped=3, density=density, dtype=torch.float32)
    agree(rule(*given), oracle(*taking_part(*given)), tolerance)


@most_rules
@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5])
def test_it_agrees_with_the_oracle_for_few_clients(name, clients):
    rule, oracle, tolerance = RULES[name]
    given = ragged(clients + 10, clients=clients + 1, size=12, dropped=1, density=0.7)  # the two differ in weight
    agree(rule(*given), oracle(*taking_part(*given)), 10 * tolerance)


# --- what holds for all of them


@every_rule
def test_rows_of_weight_0_never_matter(name):
    rule, _, tolerance = RULES[name]
    values, sent, weight = ragged(1, clients=10, dropped=3)
    out = weight == 0
    wanted = rule(values, sent, weight)
    for content in (0.0, NAN, INF, -1e30):
        for told in (True, False):
            other, who = values.clone(), sent.clone()
            other[out], who[out] = content, told
            assert same(rule(other, who, weight), wanted)
    left = rule(values[~out], sent[~out], weight[~out])
    agree(left, (wanted[0].numpy(), wanted[1].tolist()), tolerance)


@every_rule
def test_what_was_not_sent_is_never_looked_at(name):
    values, sent, weight = ragged(2)
    zero = torch.where(sent, values, 0.0)
    assert same(RULES[name][0](values, sent, weight), RULES[name][0](zero, sent, weight))


@every_rule
def test_the_order_of_the_clients_does_not_matter(name):
    rule, _, tolerance = RULES[name]
    given = ragged(3, clients=10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    one, other = rule(*given), rule(*(part[order] for part in given))
    agree(other, (one[0].numpy(), one[1].tolist()), max(tolerance, 1e-12))


@every_rule
def test_only_the_ratio_of_the_weights_matters(name):
    rule, _, tolerance = RULES[name]
    values, sent, weight = ragged(4)
    one = rule(values, sent, weight)
    agree(rule(values, sent, weight * 300), (one[0].numpy(), one[1].tolist()), max(tolerance, 1e-12))


@pytest.mark.parametrize("name", ["trimmed mean", "median", "krum"])
def test_some_ask_of_a_weight_only_whether_it_is_above_0(name):
    values, sent, weight = ragged(5)
    assert same(RULES[name][0](values, sent, weight), RULES[name][0](values, sent, (weight > 0).double()))


@every_rule
def test_what_comes_in_stays_as_it_is(name):
    given = ragged(6)
    before = [part.clone() for part in given]
    RULES[name][0](*given)
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(given, before, strict=True))
    assert torch.equal(given[0].nan_to_num(nan=5.0), before[0].nan_to_num(nan=5.0))


@every_rule
def test_updates_that_all_agree_are_the_result(name):
    row = [0.1, -2.0, None, 3e-4]
    given = case([row] * 7, weight=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    agree(RULES[name][0](*given), (np.array([0.1, -2.0, 0.0, 3e-4]), [True, True, False, True]), 1e-12)


@every_rule
def test_nobody_sent_anything(name):
    given = case([[None, None]] * 7)
    agree(RULES[name][0](*given), (np.zeros(2), [False, False]), 0.0)


@most_rules
def test_nobody_takes_part(name):
    given = case([[NAN, 1.0], [2.0, INF]], weight=[0.0, 0.0])
    agree(RULES[name][0](*given), (np.zeros(2), [False, False]), 0.0)


@most_rules
def test_one_client_alone_is_the_result(name):
    given = case([[0.5, None, -3.0], [NAN, NAN, NAN]], weight=[4.0, 0.0])
    agree(RULES[name][0](*given), (np.array([0.5, 0.0, -3.0]), [True, False, True]), 1e-12)


@every_rule
def test_all_send_the_same_one_coordinate(name):
    rule, oracle, tolerance = RULES[name]
    numbers = [
        5.0,
        1.0,
        2.0,
        9.0,
        3.0,
        4.0,
        8.0,
    ]  # seven, so that the geometric median is one of them
    given = case([[None, number, None] for number in numbers])
    mean, touched = rule(*given)
    assert touched.tolist() == [False, True, False]
    assert mean[[0, 2]].tolist() == [0.0, 0.0]
    wanted = 4.0 if name == "geometric median" else oracle(*taking_part(*given))[0][1]
    assert float(mean[1]) == pytest.approx(wanted, abs=max(tolerance, 1e-12) * 10)


@every_rule
@pytest.mark.parametrize("size", [0, 1])
def test_rows_of_no_and_of_one_coordinate(name, size):
    values, sent, weight = ragged(7, size=1, density=1.0)
    mean, touched = RULES[name][0](values[:, :size], sent[:, :size], weight)
    assert mean.shape == touched.shape == (size,)


# --- numbers by hand

FOUR = [[1.0, 8.0, None], [2.0, None, None], [3.0, 4.0, 6.0], [10.0, 0.0, NAN]]
WEIGHTS = [1.0, 3.0, 2.0, 0.0]  # the last takes no part


def by_hand(result, mean, touched):
    agree(result, (np.array(mean), touched), 1e-12)


def test_weighted_mean_by_hand():
    # (1 + 6 + 6) / 6; (8 + 8) / 6; 12 / 6
    by_hand(weighted_mean(*case(FOUR, WEIGHTS)), [13 / 6, 16 / 6, 2.0], [True, True, True])


def test_coordinate_mean_by_hand():
    given = case(FOUR, WEIGHTS)
    # (1 + 6 + 6) / 6; (8 + 8) / 3; 12 / 2
    by_hand(coordinate_mean(*given, denominator="senders"), [13 / 6, 16 / 3, 6.0], [True, True, True])
    by_hand(coordinate_mean(*given, denominator="participants"), [13 / 6, 16 / 6, 2.0], [True, True, True])


def test_a_sender_of_weight_0_touches_nothing():
    given = case([[1.0, None], [5.0, 7.0]], weight=[2.0, 0.0])
    for name in WHATEVER:
        by_hand(RULES[name][0](*given), [1.0, 0.0], [True, False])


def test_trimmed_mean_by_hand():
    # a fifth of five is one: 1 and 100 go; of four it is none; of three it is none
    rows = [[3.0, 4.0, 1.0], [1.0, 1.0, None], [100.0, 2.0, 5.0], [2.0, None, None], [4.0, 100.0, 0.0]]
    wanted = [3.0, 107 / 4, 2.0]
    by_hand(trimmed_mean(*case(rows, [1.0, 9.0, 9.0, 9.0, 1.0]), trim=0.2), wanted, [True] * 3)
    # 0.4 of five is two: the middle is left; of four it is one: 2 and 4 are left; of three one: 1 is left
    by_hand(trimmed_mean(*case(rows), trim=0.4), [3.0, 3.0, 1.0], [True] * 3)


def test_median_by_hand():
    rows = [[5.0, 1.0, None], [1.0, None, None], [2.0, 9.0, -1.0], [0.0, NAN, NAN], [-7.0, 4.0, None]]
    given = case(rows, weight=[1.0, 50.0, 1.0, 0.0, 1.0])
    by_hand(median(*given), [1.5, 4.0, -1.0], [True, True, True])  # of -7, 1, 2, 5; of 1, 4, 9; of one


def test_krum_by_hand():
    # On a line at 0, 1, 3, 10 and 4 (client order), one attacker, so two neighbours count. Squared distances:
    # 0: 1 + 9; 1: 1 + 4 = 5; 3: 1 + 4 = 5; 10: 36 + 49; 4: 1 + 9. Clients 1 and 2 tie, and 1 is the first.
    rows = [[0.0], [1.0], [3.0], [10.0], [4.0]]
    by_hand(krum(*case(rows)), [1.0], [True])
    by_hand(krum(*case([rows[2], rows[1], rows[0], *rows[3:]])), [3.0], [True])
    # three kept: 1, 3 and, of the two with 10, the one at 0, which comes first; four kept (the default): 4 as well
    by_hand(multi_krum(*case(rows), keep=3), [4 / 3], [True])
    by_hand(multi_krum(*case(rows)), [2.0], [True])
    by_hand(multi_krum(*case(rows, weight=[1.0, 1.0, 1.0, 5.0, 5.0])), [24 / 8], [True])


def test_krum_takes_what_was_not_sent_for_0():
    # with 0 for what is missing: (0, 1), (0, 1.5), (0, 0), (9, 9)
    rows = [[None, 1.0], [0.0, 1.5], [0.0, None], [9.0, 9.0]]
    by_hand(krum(*case(rows)), [0.0, 1.0], [False, True])  # one neighbour each: 0.25, 0.25, 1, far; the first of two
    by_hand(multi_krum(*case(rows)), [0.0, 1.25], [True, True])  # three kept, two of whom sent the second


def test_krum_ignores_a_dropped_row_that_would_be_best():
    rows = [[0.0], [1.0], [1.0], [3.0], [10.0], [4.0]]
    given = case(rows, weight=[1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    by_hand(krum(*given), [1.0], [True])
    with pytest.raises(ValueError, match="attackers"):  # five take part: three attackers are too many
        krum(*given, attackers=3)


def order_of(values, attackers):
    """The order of ``multi_krum``, by which rows its mean has when one more is kept."""
    given = values, torch.ones_like(values, dtype=torch.bool), torch.ones(len(values), dtype=torch.float64)
    means = [multi_krum(*given, attackers=attackers, keep=kept)[0] * kept for kept in range(1, len(values) + 1)]
    added = [means[0], *(after - before for before, after in pairwise(means))]
    return [int((values - row).abs().sum(1).argmin()) for row in added]


def clusters(second, apart=0.0, size=20):
    """Two clusters of four rows, the second ``second`` times as wide, and far from the first in one coordinate."""
    rows = torch.randn(4, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.cat([pad(rows, (0, 1)), pad(second * rows, (0, 1), value=apart)])


@pytest.mark.parametrize("clients", [9, 30])
@pytest.mark.parametrize("attackers", [0, 3])
def test_krums_order_of_long_rows_is_that_of_a_double_loop(clients, attackers):
    """More coordinates than are compared at a time; not all pieces are of one length."""
    generator = torch.Generator().manual_seed(clients)
    values = torch.randn(clients, 2 * robust._COMPARED + 7, generator=generator, dtype=torch.float64)
    scores = []
    for i, row in enumerate(values):
        far = sorted(float((row - other).square().sum()) for j, other in enumerate(values) if j != i)
        scores.append(sum(far[: clients - attackers - 2]))
    assert order_of(values, attackers) == sorted(range(clients), key=lambda i: (scores[i], i))


@pytest.mark.parametrize("apart", [1e3, 1e6])
@pytest.mark.parametrize("change", [1e-12, -1e-12])
def test_krum_sees_that_a_cluster_is_closer_by_a_trillionth(apart, change):
    """Products of rows would not: a difference of squares as large as ``apart`` squared rounds it off."""
    values = clusters(1 + change, apart)
    order = krum_order(values.numpy(), 3)  # three neighbours: those of the own cluster
    picked = krum(values, torch.ones_like(values, dtype=torch.bool), torch.ones(8), attackers=3)[0]
    assert (order[0] < 4) is (change > 0)
    assert torch.equal(picked, values[order[0]])


@pytest.mark.parametrize("first", [0, 1])
def test_of_equal_clusters_krum_takes_the_row_of_the_lowest_index(first):
    values = clusters(1.0, 1e3)
    values = torch.cat([values[4:], values[:4]]) if first else values
    picked = krum(values, torch.ones_like(values, dtype=torch.bool), torch.ones(8), attackers=3)[0]
    assert float(picked[-1]) == (1e3 if first else 0.0)


def test_krum_is_not_disturbed_by_what_all_rows_share():
    """A common shift of 2^40: the differences stay exact, products would keep none of them."""
    values = (clusters(1.5, 7.0) * 2**6).round()
    one = torch.ones_like(values, dtype=torch.bool)
    index = krum_order(values.numpy(), 3)[0]
    assert torch.equal(krum(values + 2.0**40, one, torch.ones(8), attackers=3)[0], values[index] + 2.0**40)


class Largest(TorchDispatchMode):
    """The most values that a tensor has."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [part.numel() for part in tree_leaves(result) if torch.is_tensor(part)]
        self.values = max(self.values, *found, 0)
        return result


@every_rule
def test_no_tensor_is_larger_than_the_rows(name):
    values, sent, weight = ragged(9, clients=40, size=300, dropped=0)
    with Largest() as largest:
        RULES[name][0](values, sent, weight)
    assert largest.values == values.numel()


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e2])
def test_geometric_median_by_hand(scale):
    def of(rows, weight=None):
        mean, touched = geometric_median(*case([[scale * v for v in row] for row in rows], weight))
        assert touched.all()
        return [v / scale for v in mean.tolist()]

    root = math.sqrt(3)
    # an equilateral triangle's and a square's centre
    assert of([[0.0, 0.0], [1.0, 0.0], [0.5, root / 2]]) == pytest.approx([0.5, root / 6], abs=1e-5)
    assert of([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]) == pytest.approx([1.0, 1.0], abs=1e-5)
    # Fermat's point of half a square: sqrt(2) t + 2 sqrt((1 - t)^2 + t^2) is least at t = (3 - sqrt(3)) / 6
    point = (3 - root) / 6
    assert of([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]) == pytest.approx([point, point], abs=1e-5)
    # of four corners of a convex quadrangle: where its diagonals cross
    assert of([[0.0, 0.0], [4.0, 4.0], [0.0, 2.0], [2.0, 0.0]]) == pytest.approx([1.0, 1.0], abs=1e-5)
    # a client of double weight counts as two
    one = of([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], weight=[1.0, 1.0, 1.0, 2.0])
    assert one == pytest.approx(of([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [2.0, 2.0]]), abs=1e-5)
    assert 1.0 < one[0] < 2.0


def test_geometric_median_is_the_client_that_outweighs_the_others():
    rows, weight = [[1.0, 2.0], [5.0, 0.0], [None, 7.0]], [5.0, 2.0, 2.0]
    mean, touched = geometric_median(*case(rows, weight))
    assert mean.tolist() == pytest.approx([1.0, 2.0], abs=1e-5)
    assert touched.tolist() == [True, True]


def test_geometric_median_takes_what_was_not_sent_for_0():
    # (0, 0), (1, 0), (0, 1): half a square again
    mean, touched = geometric_median(*case([[None, None], [1.0, None], [None, 1.0]]))
    assert mean.tolist() == pytest.approx([(3 - math.sqrt(3)) / 6] * 2, abs=1e-6)
    assert touched.tolist() == [True, True]


# --- what they are for


@pytest.mark.parametrize("name", ["trimmed mean", "median", "krum of 3", "multi-krum of 2, 3 kept", "geometric median"])
@pytest.mark.parametrize("lie", [1e3, -1e3, 1e9])
def test_two_liars_of_ten_do_not_pull_the_result_out_of_the_honest(name, lie):
    rule, honest = RULES[name][0], torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.cat([honest, torch.full((2, 5), lie, dtype=torch.float64)])
    mean, _ = rule(values, torch.ones(10, 5, dtype=torch.bool), torch.ones(10, dtype=torch.float64))
    assert bool(((mean > -0.5) & (mean < 1.5)).all())
    plain, _ = weighted_mean(values, torch.ones(10, 5, dtype=torch.bool), torch.ones(10, dtype=torch.float64))
    assert bool((plain.abs() > 100).all())


def test_geometric_median_agrees_with_the_oracle_beside_liars():
    values, sent, weight = ragged(8, clients=12, dropped=0, density=1.0)
    values[:3] = 1e3 * torch.sign(values[:3])
    weight = torch.ones(12, dtype=torch.float64)
    agree(geometric_median(values, sent, weight), plain_geometric_median(*taking_part(values, sent, weight)), 1e-5)


# --- wrong options, and names


@pytest.mark.parametrize("trim", [-0.1, 0.5, 0.7, NAN])
def test_a_share_to_trim_outside_its_range_is_refused(trim):
    with pytest.raises(ValueError, match="trim") as error:
        trimmed_mean(*ragged(0), trim=trim)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("denominator", ["everyone", "", "Senders", None])
def test_another_denominator_is_refused(denominator):
    with pytest.raises(ValueError, match=r"senders.*participants|participants.*senders") as error:
        coordinate_mean(*ragged(0), denominator=denominator)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", [krum, multi_krum])
@pytest.mark.parametrize(("clients", "attackers"), [(1, 0), (2, 0), (3, 1), (4, 2), (7, 5), (0, 0)])
def test_too_few_clients_for_krum_are_refused(rule, clients, attackers):
    rows, weight = [[float(k)] for k in range(clients + 2)], [1.0] * clients + [0.0] * 2
    with pytest.raises(ValueError, match="attackers") as error:
        rule(*case(rows, weight), attackers=attackers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", [krum, multi_krum])
@pytest.mark.parametrize(("clients", "attackers"), [(3, 0), (4, 1), (8, 5)])
def test_just_enough_clients_for_krum_will_do(rule, clients, attackers):
    rows, weight = [[float(k**2)] for k in range(clients + 1)], [1.0] * clients + [0.0]
    mean, touched = rule(*case(rows, weight), attackers=attackers)
    # one neighbour counts: 0 and 1 are each other's nearest
    wanted = 0.0 if rule is krum else np.mean([float(k**2) for k in range(clients - attackers)])
    assert float(mean[0]) == pytest.approx(wanted)
    assert touched.tolist() == [True]


def test_defaults_are_the_documented_ones():
    defaults = {
        trimmed_mean: {"trim": 0.2},
        krum: {"attackers": 1},
        multi_krum: {"attackers": 1, "keep": None},
    }
    for function, wanted in defaults.items():
        assert {name: inspect.signature(function).parameters[name].default for name in wanted} == wanted


def test_the_package_offers_them():
    names = ["weighted_mean", "coordinate_mean", "trimmed_mean", "median", "krum", "multi_krum", "geometric_median"]
    assert all(getattr(server, name) is getattr(robust, name) for name in names)


# --- attackers of any size, and lost rows

ROBUST = ["trimmed by 0.3", "median", "krum of 3", "multi-krum of 2, 3 kept", "geometric median"]


def attacked(power, seed=0, honest=7, liars=2, size=5):
    """Honest rows near 1 and, last, liars at ten to a power, of either sign."""
    rng = np.random.default_rng(seed)
    far = rng.choice([-1.0, 1.0], (liars, size)) * 10.0**power
    values = np.concatenate([1 + rng.normal(size=(honest, size)) / 10, far])
    return torch.tensor(values), torch.ones(honest + liars, size, dtype=torch.bool), torch.ones(honest + liars).double()


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_attackers_of_any_size_move_no_robust_mean_out_of_the_honest(name, scale):
    """The bound is a geometric median's, of a share a: 2 (1 - a) / (1 - 2 a) times how far honest rows lie apart."""
    for power in range(1, 301):
        values, sent, weight = attacked(power, seed=power)
        honest = values[:7]
        values = (values * scale).clamp(-1e308, 1e308)
        mean, _ = RULES[name][0](values, sent, weight)
        away = float((mean / scale - honest.mean(0)).norm())
        most = float((honest - honest.mean(0)).norm(dim=1).max())
        share = 2 / 9
        assert away <= 2 * (1 - share) / (1 - 2 * share) * most, (power, away, most)


@pytest.mark.parametrize("power", [3, 6, 12, 15, 30, 100, 300])
def test_a_geometric_median_beside_far_attackers_is_that_with_unit_pulls(power):
    """An attacker so far away pulls by its weight in its direction, whatever its distance: scipy on that sum."""
    values, sent, weight = attacked(power, seed=power)
    honest, pull = values[:7].numpy(), (values[7:].sign() / math.sqrt(5)).numpy().sum(0)

    def total(z):
        away = z - honest
        norm = np.linalg.norm(away, axis=1)
        return norm.sum() - pull @ z, (away / norm[:, None]).sum(0) - pull

    wanted = minimize(total, honest.mean(0), jac=True, method="BFGS", options={"gtol": 1e-12}).x
    mean, _ = geometric_median(values, sent, weight)
    assert mean.numpy() == pytest.approx(wanted, abs=1e-6 if power > 3 else 1e-2)


@pytest.mark.parametrize("seed", range(20))
def test_a_geometric_median_minimises_the_weighted_sum_of_distances_beside_any_attacker(seed):
    rng = np.random.default_rng(seed)
    clients, size = int(rng.integers(3, 12)), int(rng.integers(1, 6))
    values, weight = rng.normal(size=(clients, size)), rng.integers(1, 5, clients).astype(float)
    values[-1] *= 10.0 ** rng.uniform(0, 9)
    weight[-1] = 1.0
    given = torch.tensor(values), torch.ones(clients, size, dtype=torch.bool), torch.tensor(weight)
    mean = geometric_median(*given)[0].numpy()

    def total(z):
        return np.linalg.norm(values - z, axis=1) @ weight

    near = minimize(total, mean, method="Nelder-Mead", options={"xatol": 1e-10}).fun
    assert all(total(mean) <= least * (1 + 1e-9) for least in (near, *map(total, values)))


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**-20, 2.0**90])
@pytest.mark.parametrize("name", list(RULES))
def test_the_unit_of_the_updates_does_not_matter_to_the_bit(name, unit):
    values, sent, weight = ragged(11, dropped=0)
    one, other = RULES[name][0](values, sent, weight), RULES[name][0](values * unit, sent, weight)
    assert same((one[0] * unit, one[1]), other)


@every_rule
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_is_left_out(name, junk):
    values, sent, weight = ragged(12, clients=10, dropped=0, density=1.0)
    values[4, 2] = junk
    weight[4] = 1e9
    keep = [k for k in range(10) if k != 4]
    rule = RULES[name][0]
    wanted = {"krum": krum, "krum of 3": krum, "multi-krum": multi_krum, "multi-krum of 2, 3 kept": multi_krum}.get(
        name
    )
    left = {"krum": {"attackers": 0}, "krum of 3": {"attackers": 2}, "multi-krum": {"attackers": 0}}
    left["multi-krum of 2, 3 kept"] = {"attackers": 1, "keep": 3}
    others = values[keep], sent[keep], weight[keep]
    assert same(rule(values, sent, weight), rule(*others) if wanted is None else wanted(*others, **left[name]))


@pytest.mark.parametrize("rule", [krum, multi_krum])
@pytest.mark.parametrize("lost", range(9))
def test_krum_goes_on_however_many_rows_are_lost(rule, lost):
    """Eight clients of whom five may attack: each that is lost is one that has been found."""
    values = torch.tensor([[float(k**2)] for k in range(8)], dtype=torch.float64)
    values[8 - lost :] = NAN
    mean, touched = rule(values, torch.ones(8, 1, dtype=torch.bool), torch.ones(8).double(), attackers=5)
    n, unknown = 8 - lost, max(0, 5 - lost)
    kept = 1 if rule is krum else n - unknown
    assert touched.tolist() == [n > 0]
    wanted = [k**2 for k in (plain_order(n, unknown) if n else [])][:kept]
    assert float(mean[0]) == pytest.approx(np.mean(wanted) if wanted else 0.0)


def plain_order(n, attackers):
    """Krum's order of 0, 1, 4, 9 ...; one neighbour is the least that is compared."""
    scores = []
    for i in range(n):
        far = sorted((i**2 - j**2) ** 2 for j in range(n) if j != i)
        scores.append(sum(far[: max(1, n - attackers - 2)]))
    return sorted(range(n), key=lambda i: (scores[i], i))


@every_rule
def test_nothing_but_lost_rows(name):
    given = case([[NAN, INF]] * 8)
    agree(RULES[name][0](*given), (np.zeros(2), [False, False]), 0.0)


def test_two_rows_of_krum_are_compared_by_the_coordinates_that_are_named():
    rows = [[0.0, 9.0], [0.1, -9.0], [0.2, 9.0], [5.0, 9.0], [7.0, 9.0]]
    by_hand(krum(*case(rows), by=1), [0.1, -9.0], [True, True])
    by_hand(krum(*case(rows)), [0.2, 9.0], [True, True])
    by_hand(multi_krum(*case(rows), attackers=2, keep=2, by=1), [0.05, 0.0], [True, True])


# --- in a round: those who were left out, and buffers


def closed(average, update, groups=1, processes=None):
    rule = server.Robust(average)
    tally = rule.zero(groups, update.rows.shape[1], update.buffers.shape[1], torch.device("cpu"))
    rule.add(tally, update, [0] * len(update.clients))
    return rule.finish(rule.merge(tally))


def sent_by(rows, buffers=None, refused=()):
    rows = torch.tensor(rows)
    clients, out = len(rows), dict.fromkeys(refused, "")
    extra = torch.zeros(clients, 0) if buffers is None else torch.tensor(buffers)
    numbers = tuple(0.0 if k in out else 1.0 + k for k in range(clients))
    return Update(tuple(range(clients)), rows, extra, numbers, numbers, refused=out)


def test_krum_in_a_round_that_loses_a_client():
    """Eight clients of whom five may attack: before, seven were too few, and the run ended."""
    rows = [[1.0], [1.1], [1.3], [9.0], [-9.0], [0.0], [5.0], [0.0]]
    change = closed(partial(krum, attackers=5), sent_by(rows, refused=[7]))
    assert change.rows[0].tolist() == pytest.approx([1.0])  # two neighbours... of seven, four may attack: one counts
    with pytest.raises(ValueError, match="5 attackers need 8 clients"):
        closed(partial(krum, attackers=5), sent_by(rows[:7]))  # nobody was lost: there never were eight


def test_padding_is_nobody_who_was_lost():
    update = sent_by([[1.0], [1.1], [1.3], [0.0]], refused=[3])
    with pytest.raises(ValueError, match="1 attackers need 4 clients"):
        closed(partial(krum, attackers=1), replace(update, clients=(0, 1, 2, -1)))
    assert closed(partial(krum, attackers=1), update).rows[0].tolist() == pytest.approx([1.0])


BUFFERS = [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0], [1e12, -1e12]]


@pytest.mark.parametrize("name", [*ROBUST[:2], "geometric median"])
def test_buffers_take_the_same_robust_mean(name):
    rows = [[0.1], [0.2], [0.3], [0.4], [0.5]]
    rule = RULES[name][0]
    change = closed(rule, sent_by(rows, BUFFERS))
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    one = torch.ones(5, 2, dtype=torch.bool)
    wanted = rule(torch.tensor(BUFFERS), one, weight)[0]
    assert torch.equal(change.buffers[0], wanted)
    assert change.rows[0].shape == (1,)
    assert float(change.rows[0]) == float(rule(torch.tensor(rows), one[:, :1], weight)[0])
    assert bool((wanted.abs() < 10).all())


def test_krum_takes_the_buffers_of_the_rows_that_it_picks():
    rows = [[0.0], [0.1], [0.2], [5.0], [-7.0]]
    buffers = [[10.0], [-1e9], [30.0], [40.0], [50.0]]  # of which Krum is told nothing
    assert closed(krum, sent_by(rows, buffers)).buffers.tolist() == [[-1e9]]
    change = closed(partial(multi_krum, attackers=2, keep=2), sent_by(rows, buffers))
    weight, picked = torch.tensor([1.0, 2.0]), torch.tensor([10.0, -1e9])
    assert float(change.buffers) == pytest.approx(float((weight * picked).sum() / 3))


def test_a_lost_clients_buffers_do_not_matter():
    rows, buffers = [[0.1], [0.2], [0.3], [9.0]], [[1.0], [2.0], [3.0], [NAN]]
    change = closed(median, sent_by(rows, buffers, refused=[3]))
    assert (float(change.rows), float(change.buffers)) == pytest.approx((0.2, 2.0))
