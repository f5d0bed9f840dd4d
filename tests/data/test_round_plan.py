"""Who trains on what, by hand: steps of a pass, cohorts of one and several processes, weights."""

from __future__ import annotations

import numpy as np
import pytest

from fedsparse.data.rounds import PADDING, LocalWork, RoundPlan, deal
from fedsparse.federation.server.sampling import participants


@pytest.mark.parametrize(
    ("share", "number"), [(0.01, 1), (0.074, 1), (0.076, 2), (0.125, 3), (0.99, 20), (1.0, 20), (1, 1), (20, 20)]
)
def test_a_share_of_twenty_clients_is_rounded_and_one_at_least(share, number):
    assert participants(share, 20) == number


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
        plan = plan_of(clients, cohort=bound, processes=processes, process=process, separate=alone)
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


def test_ragged_clients_of_a_cohort_by_hand():
    """Five samples in batches of two are three steps, two are one: what the second client does not fill is ignored."""
    parts = [np.arange(5), np.arange(5, 7)]
    (cohort,) = RoundPlan(parts, LocalWork(2, None, 1), lambda _: [0, 1], cohort=2).cohorts(4)
    assert cohort.round == 4
    assert cohort.samples.shape == (2, 3, 2)
    assert cohort.count == ((2, 2), (2, 0), (1, 0))
    assert sorted(cohort.samples[0].flatten()[:5].tolist()) == list(range(5))
    assert sorted(cohort.samples[1, 0].tolist()) == [5, 6]
    assert set(cohort.samples.flatten().tolist()) == set(range(7))
    assert cohort.members == [(0, 0), (1, 1)]
    assert cohort.weight == (5.0, 2.0)


def test_a_cohort_without_clients_has_one_step_of_nothing():
    plan = RoundPlan([np.arange(3)], LocalWork(1, 1), lambda _: [0], cohort=2, processes=2, process=1)
    (empty,) = plan.cohorts(0)
    assert (empty.clients, empty.count, empty.weight, empty.members) == ((PADDING,), ((0,),), (0.0,), [])
    assert empty.samples.tolist() == [[[0]]]
    (one,) = RoundPlan([np.array([8])], LocalWork(1, 1), lambda _: [0], cohort=1).cohorts(0, rows=2)
    assert (one.samples.tolist(), one.count) == ([[[8]], [[8]]], ((1, 0),))


def test_samples_depend_on_seed_round_and_client_alone():
    parts = [np.arange(50), np.arange(50)]
    work = LocalWork(5, 2)

    def dealt(round, **options):
        return [
            cohort.samples.tolist() for cohort in RoundPlan(parts, work, lambda _: [0, 1], **options).cohorts(round)
        ]

    assert dealt(0) == dealt(0, seed=0)
    assert dealt(0) != dealt(0, seed=1)
    assert dealt(0) != dealt(1)
    assert dealt(0)[0] != dealt(0)[1]


@pytest.mark.parametrize(
    ("work", "held", "steps"),
    [
        (LocalWork(4, 3), 100, 3),
        (LocalWork(4, None, 1), 8, 2),
        (LocalWork(4, None, 3), 9, 9),
        (LocalWork(4, None, 2), 1, 2),
    ],
)
def test_local_steps_are_counted_as_they_are_dealt(work, held, steps):
    assert work.count(held) == steps
    assert len(work.batches(np.arange(held), np.random.default_rng(0))[1]) == steps


@pytest.mark.parametrize("work", [LocalWork(4, 3), LocalWork(4, None, 2)], ids=["steps", "epochs"])
def test_samples_of_a_round_are_counted_as_they_are_dealt(work):
    """Those that fill a short batch do not count."""
    parts = [np.arange(held) for held in (1, 4, 9, 30)]
    plan = RoundPlan(parts, work, lambda _: [0, 2, 3], cohort=1)
    dealt = [work.batches(parts[client], np.random.default_rng(0))[1] for client in (0, 2, 3)]
    assert plan.samples(5) == sum(map(sum, dealt))


def test_steps_shuffle_a_clients_samples_again_when_they_run_out():
    indices, counts = LocalWork(4, 3).batches(np.arange(5), np.random.default_rng(0))
    order = indices.flatten().tolist()
    assert counts == [4, 4, 4]
    assert [sorted(order[:5]), sorted(order[5:10])] == [list(range(5))] * 2
    assert len(set(order[10:])) == 2


def test_work_by_default_is_four_steps_of_32_samples():
    assert LocalWork() == LocalWork(32, 4, None, "held")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1, "epochs": 1}, "give either federation.local_steps or federation.local_epochs"),
        ({"steps": None}, "give either federation.local_steps or federation.local_epochs"),
        ({"steps": 0}, "federation.local_steps is 0; it must be null, or a whole number of 1 or more"),
        ({"steps": None, "epochs": 0}, "federation.local_epochs is 0; it must be null, or a whole number of 1 or more"),
        ({"batch_size": 0}, "data.batch_size is 0; it must be a whole number of 1 or more"),
        ({"weight": "held "}, "federation.weight is 'held '; it must be held, processed or equal"),
    ],
)
def test_work_that_cannot_be_meant_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LocalWork(**options)


def test_one_process_keeps_the_order_given_and_several_take_the_longest_first():
    assert deal([1, 3, 2], 1) == [[0, 1, 2]]
    assert deal([1, 3, 2], 2) == [[1], [2, 0]]
    assert deal([2, 2, 2], 2) == [[0, 2], [1]]  # of equal loads the first
