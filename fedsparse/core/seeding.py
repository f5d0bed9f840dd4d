"""Keyed randomness: a generator of its own for (seed, purpose, round, client), never one global stream.

So a resumed run draws what the run in one go would have drawn, and neither the cohort size nor the number of
processes changes a draw.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a stream of random numbers is for; the numbers are part of what a seed means and never change."""

    SAMPLING = 1
    BATCHES = 2
    CALIBRATION = 3
    MASK = 4
    HEAD = 5
    TEST_PARTS = 6
    DROPOUT = 7
    AUGMENT = 8
    EXCHANGE = 9
    EXPLORERS = 10
    EXPLORE = 11
    PERSONAL = 12


def generator(seed: int, purpose: Purpose, *ids: int) -> np.random.Generator:
    """Make the numpy generator of one purpose; ``ids`` are non-negative integers such as round and client.

    >>> generator(0, Purpose.BATCHES, 3, 7).integers(100) == generator(0, Purpose.BATCHES, 3, 7).integers(100)
    np.True_
    """
    # the count of ids belongs to the key: numpy pads a key with zeros, so that (3,) and (3, 0) would be one stream
    return np.random.default_rng((seed, int(purpose), len(ids), *ids))


def torch_generator(seed: int, purpose: Purpose, *ids: int) -> torch.Generator:
    """Make the torch (CPU) generator of one purpose."""
    return torch.Generator().manual_seed(int(generator(seed, purpose, *ids).integers(2**62)))


def number(seed: int, purpose: Purpose, *ids: int) -> int:
    """Make one 63-bit number of a purpose in a microsecond, where building a generator would cost twenty.

    Chained splitmix64 (Steele, Lea and Flood 2014).
    """
    state = 0
    for key in (seed, int(purpose), *ids):
        state = (state + key + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
