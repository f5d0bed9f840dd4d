"""Clients of nc classes each are as even as can be: against a maximum flow, and against dealing in turn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from fedsparse.data import dealing, even, partition


def sizes_of(parts):
    return np.array([len(part) for part in parts])


def dealt_in_turn(labels, clients, nc, seed):
    """Each class in turn to its holders, the first of whom get what is left: one sample at a time."""
    rng = dealing.stream(seed, partition._CLASSES)
    chosen = dealing.deal_classes(clients, labels.max() + 1, nc, rng).reshape(-1)
    slots, order = dealing.grouped(chosen, rng), dealing.grouped(labels, rng)
    parts = [[] for _ in range(clients)]
    for name in range(labels.max() + 1):
        holders = [slot // nc for slot in slots if chosen[slot] == name]
        for place, sample in enumerate(i for i in order if labels[i] == name):
            if holders:
                parts[holders[place % len(holders)]].append(sample)
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def can_be_even(held, sizes):
    """Whether all clients can hold m or m + 1, each class dealt in shares that differ by one: a flow fills all of it.

    What is left of a class flows to its holders, one each; a client takes what it lacks to m, and some one more.
    """
    clients, classes = held.shape
    sizes = np.where(held.any(0), sizes, 0)
    whole, left = np.divmod(sizes, np.maximum(held.sum(0), 1))
    own, (least, over) = held @ whole, divmod(int(sizes.sum()), clients)
    lacking = least - own
    if (lacking < -1).any():
        return False
    start, first, spare = 0, 1 + classes, 1 + classes + clients
    edges = [(start, 1 + c, left[c]) for c in range(classes)]
    edges += [(1 + c, first + k, 1) for k, c in np.argwhere(held)]
    edges += [(first + k, spare + 1, max(n, 0)) for k, n in enumerate(lacking)]
    edges += [(first + k, spare, 1) for k, n in enumerate(lacking) if n >= 0]
    full = int((lacking < 0).sum())  # who has m + 1 already
    edges.append((spare, spare + 1, over - full))
    if over < full:
        return False
    rows, columns, capacity = np.array(edges).T
    graph = csr_matrix((capacity.astype(np.int32), (rows, columns)), shape=(spare + 2,) * 2)
    return maximum_flow(graph, start, spare + 1).flow_value == left.sum()


def test_a_hundred_clients_of_all_hundred_classes_hold_450_each():
    labels = np.repeat(np.arange(100), 450)
    assert np.ptp(sizes_of(dealt_in_turn(labels, 100, 100, 0))) > 10  # the shares of a class are as even
    for seed in range(3):
        parts = partition.classes_per_client(labels, num_clients=100, nc=100, seed=seed)
        assert sizes_of(parts).tolist() == [450] * 100
        assert set(np.concatenate([np.bincount(labels[part], minlength=100) for part in parts]).tolist()) == {4, 5}


@settings(deadline=None, max_examples=150)
@given(clients=st.integers(2, 12), classes=st.integers(2, 8), data=st.data())
def test_sizes_are_within_one_wherever_a_flow_says_that_they_can_be(clients, classes, data):
    nc = data.draw(st.integers(1, classes))
    least = data.draw(st.integers(12, 20))
    sizes = least + np.array(data.draw(st.lists(st.integers(0, 3), min_size=classes, max_size=classes)))
    labels, seed = np.repeat(np.arange(classes), sizes), data.draw(st.integers(0, 9))
    parts = (
        partition.classes_per_client(labels, num_clients=clients, nc=nc, seed=seed) if clients * nc >= classes else []
    )
    if not parts:
        return
    counts = np.array([np.bincount(labels[part], minlength=classes) for part in parts])
    assert (np.ptp(sizes_of(parts)) <= 1) == can_be_even(counts > 0, sizes)
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1
    before = dealt_in_turn(labels, clients, nc, seed)
    was = np.array([np.bincount(labels[part], minlength=classes) for part in before])
    assert ((was > 0) == (counts > 0)).all()
    # a sample moves only where the number does, so that where sizes were within one all is as it was
    moved = sum(np.setdiff1d(part, other).size for part, other in zip(parts, before, strict=True))
    assert moved == np.abs(was - counts).sum() // 2
    assert (counts.sum(1) ** 2).sum() <= (was.sum(1) ** 2).sum()
    if np.ptp(was.sum(1)) <= 1:
        assert moved == 0


def test_one_sample_is_handed_on_through_another_client():
    """By hand: 0 has 2 of its own, 2 has 1; each shares 3 of a class with client 1, who gives one as it takes one.

    In turn they would hold 4, 3 and 2; and no class is held by both 0 and 2.
    """
    got = even.holders_of_one_more(np.array([0, 1, 1, 2, 0, 2]), np.array([2, 2, 1, 1]), np.array([3, 3, 2, 1]))
    assert got.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("clients", [3, 1000])
def test_nothing_is_left_where_holders_divide_classes(clients):
    labels = np.repeat(np.arange(3), clients * 2)
    parts = partition.classes_per_client(labels, num_clients=clients, nc=3, seed=0)
    assert sizes_of(parts).tolist() == [6] * clients
