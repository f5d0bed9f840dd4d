"""A million clients: what a round takes does not depend on how many there are."""

from __future__ import annotations

import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch

from fedsparse.data.partition import client_tests, iid
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.server.aggregation import FedNova, WeightedMean, add_scaled
from fedsparse.federation.server.sampling import uniform


def peak_of_a_round(clients, taking_part=1000):
    """Bytes allocated to sample the clients of a round and to deal their samples to their steps."""
    sample = partial(uniform, eligible=range(clients), count=taking_part, seed=0)
    plan = RoundPlan([np.arange(10)] * clients, LocalWork(4, 2), sample)
    tracemalloc.start()
    cohorts = plan.cohorts(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({cohort.clients for cohort in cohorts}) == taking_part
    return peak


def test_the_memory_of_a_round_does_not_depend_on_the_population():
    peak_of_a_round(100_000)  # what is allocated once
    assert peak_of_a_round(1_000_000) < 1.1 * peak_of_a_round(100_000)


@pytest.mark.parametrize("rule", [WeightedMean(), WeightedMean("participants"), FedNova()])
@pytest.mark.parametrize("own", [False, True])
def test_the_memory_of_aggregation_does_not_depend_on_the_clients_of_a_round(rule, own):
    tally = rule.zero(1, 50, 0, torch.device("cpu"), own)
    held, place = tally.vector.nbytes, tally.vector.data_ptr()
    assert held == 8 * (50 + 50 * own + 3)  # the sums of rows and senders, of weights, steps and losses
    sent = torch.ones(1, 50, dtype=torch.bool) if own else None
    for client in range(100):
        update = Update((client,), torch.ones(1, 50), torch.zeros(1, 0), (1.0,), (0.5,), sent, steps=(2.0,))
        rule.add(tally, update, [0])
    assert (tally.vector.nbytes, tally.vector.data_ptr()) == (held, place)
    assert (len(tally.weight), len(tally.steps)) == (1, 1)
    assert torch.equal(rule.finish(tally).rows, torch.ones(1, 50, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_sum_in_chunks_is_the_sum(chunk):
    """Each float32 value is taken to float64 before it is weighed."""
    row = torch.randn(50, generator=torch.Generator().manual_seed(0))
    total = torch.full((50,), 3.0, dtype=torch.float64)
    add_scaled(total, row, 0.1, chunk)
    assert total.tolist() == pytest.approx([3.0 + 0.1 * float(value) for value in row], abs=1e-15)


@pytest.mark.slow
def test_a_million_clients_hold_ten_million_samples():
    """Every sample once, every client its ten, and a test part for each; 3 s and 0.6 GB for the partition alone."""
    labels = np.random.default_rng(0).integers(0, 10, 10_000_000)
    parts = iid(labels, 1_000_000, 0)
    assert {len(part) for part in parts} == {10}
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(10_000_000))
    assert len(client_tests(parts, labels, labels[:10_000], 0)) == 1_000_000
