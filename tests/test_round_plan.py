"""Who trains on what, by hand: steps of a pass, cohorts of one and several processes, weights."""

from __future__ import annotations

import numpy as np
import pytest

from fedsparse.data.rounds import PADDING, LocalWork, RoundPlan


def plan_of(clients, *, held=4, work=None, **options):
    parts = [np.arange(held) + 100 * client for client in range(clients)]
    return RoundPlan(parts, work or LocalWork(2, 2), lambda _: range(clients), **options)


def test_an_epoch_ends_on_a_short_batch_that_repeats_its_first_sample():
    indices, counts = LocalWork(4, None, 2).batches(np.arange(10) + 50, np.random.default_rng(0))
    assert counts == [4, 4, 2, 4, 4, 2]
    assert indices.shape == (6, 4)
    for one_pass in (indices[:3], indices[3:]):
        order = one_pass.ravel()
        assert sorted(order[:10].tolist()) == list(range(50, 60))
        assert order[10:].tolist() == [order[0]] * 2


@pytest.mark.parametrize(("held", "counts"), [(1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])])
def test_steps_of_one_pass_by_hand(held, counts):
    indices, dealt = LocalWork(4, None, 1).batches(np.arange(held) + 7, np.random.default_rng(1))
    assert dealt == counts
    assert indices.size == 4 * len(counts)
    real = [index for row, count in zip(indices.tolist(), counts, strict=True) for index in row[:count]]
    assert sorted(real) == list(range(7, 7 + held))


def test_a_client_of_one_sample_fills_its_batch_with_it():
    indices, counts = LocalWork(4, None, 1).batches(np.array([9]), np.random.default_rng(2))
    assert (indices.tolist(), counts) == ([[9, 9, 9, 9]], [1])


def test_each_client_is_a_cohort_unless_more_may_train_together():
    cohorts = plan_of(3).cohorts(0)
    assert [cohort.clients for cohort in cohorts] == [(0,), (1,), (2,)]
    assert plan_of(3).number_of_cohorts(0) == 3


@pytest.mark.parametrize(
    ("clients", "bound", "processes", "alone", "wanted"),
    [
        # five at a bound of two: three cohorts, of two, two and one
        (5, 2, 1, False, [[(0, 1), (2, 3), (4, PADDING)]]),
        (4, 2, 1, False, [[(0, 1), (2, 3)]]),
        # two processes with three and two clients have as many cohorts each
        (5, 2, 2, False, [[(0, 2), (4, PADDING)], [(1, 3), (PADDING, PADDING)]]),
        (5, 1, 2, False, [[(0,), (2,), (4,)], [(1,), (3,), (PADDING,)]]),
        # one in each cohort, of as many rows as if they trained together
        (3, 2, 1, True, [[(0, PADDING), (1, PADDING), (2, PADDING)]]),
        (3, 3, 2, True, [[(0, PADDING), (2, PADDING)], [(1, PADDING), (PADDING, PADDING)]]),
    ],
)
def test_cohorts_by_hand(clients, bound, processes, alone, wanted):
    for process in range(processes):
        plan = plan_of(clients, cohort=bound, processes=processes, process=process, alone=alone)
        cohorts = plan.cohorts(0)
        assert [cohort.clients for cohort in cohorts] == wanted[process]
        assert plan.number_of_cohorts(0) == len(wanted[process])
        for cohort in cohorts:
            assert [weight > 0 for weight in cohort.weight] == [client != PADDING for client in cohort.clients]


@pytest.mark.parametrize(("weight", "wanted"), [("held", 5.0), ("processed", 6.0), ("equal", 1.0)])
def test_a_weight_says_whether_it_counts_the_samples_to_process(weight, wanted):
    (cohort,) = plan_of(1, held=5, work=LocalWork(3, 2, None, weight)).cohorts(0)
    assert cohort.weight == (wanted,)
    assert cohort.processed == (weight == "processed")
