"""Streams of random numbers by key: what a seed means is fixed for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsparse.core.seeding import Purpose, generator, number, torch_generator


def test_what_a_seed_means_never_changes():
    """Stored runs are continued and repeated by these numbers: add, never change."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "SAMPLING": 1,
        "BATCHES": 2,
        "CALIBRATION": 3,
        "MASK": 4,
        "HEAD": 5,
        "TEST_PARTS": 6,
        "DROPOUT": 7,
        "AUGMENT": 8,
        "EXCHANGE": 9,
        "EXPLORERS": 10,
        "EXPLORE": 11,
        "PERSONAL": 12,
        "LANDSCAPE": 13,
        "CLUSTERS": 14,
        "ADAPTERS": 15,
    }


@pytest.mark.parametrize("ids", [(), (3,), (3, 0), (0, 3), (2**32 - 1, 2), (2**32, 2), (2**40, 1, 7)])
def test_a_key_is_the_seed_the_purpose_the_count_of_ids_and_the_ids(ids):
    wanted = np.random.default_rng([5, 4, len(ids), *ids]).integers(2**62, size=4).tolist()
    assert generator(5, Purpose.MASK, *ids).integers(2**62, size=4).tolist() == wanted
    drawn = torch.rand(3, generator=torch_generator(5, Purpose.MASK, *ids))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(wanted[0])))


def mixed(state, key):
    """Splitmix64 as its authors write it, in numpy's 64 bits."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(key) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@pytest.mark.parametrize("ids", [(), (1,), (12, 345), (2**63, 2**64 - 1)])
def test_a_number_is_chained_splitmix(ids):
    state = np.uint64(0)
    for key in (9, 7, *ids):
        state = mixed(state, key)
    assert number(9, Purpose.DROPOUT, *ids) == int(state) // 2 < 2**63


def test_splitmix_gives_its_authors_number():
    assert int(mixed(0, 0)) == 0xE220A8397B1DCDAF  # the first output of seed 0
