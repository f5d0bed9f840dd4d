"""Keyed randomness: one generator for each (seed, purpose, round, client), never one global stream.

So a resumed run draws the same numbers as an uninterrupted one, and neither the cohort size nor the number of
processes changes a draw.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1
_WORD = 1 << 32


class Purpose(IntEnum):
    """Purpose of a stream of random numbers; the values are part of the keys and never change."""

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
    LANDSCAPE = 13
    CLUSTERS = 14
    ADAPTERS = 15


def generator(seed: int, purpose: Purpose, *ids: int) -> np.random.Generator:
    """Build the numpy generator of a purpose; ``ids`` are non-negative integers such as round and client.

    >>> generator(0, Purpose.BATCHES, 3, 7).integers(100) == generator(0, Purpose.BATCHES, 3, 7).integers(100)
    np.True_
    """
    # the key has the number of ids, as numpy pads keys with zeros: else (3,) and (3, 0) would be one stream
    key = (seed, int(purpose), len(ids), *ids)
    small = 0 <= min(key) <= max(key) < _WORD  # then numpy need not split the numbers into words: the same stream
    return np.random.default_rng(np.array(key, dtype=np.uint32) if small else key)


def torch_generator(seed: int, purpose: Purpose, *ids: int) -> torch.Generator:
    """Build the torch generator (CPU) of a purpose."""
    return torch.Generator().manual_seed(int(generator(seed, purpose, *ids).integers(2**62)))


def number(seed: int, purpose: Purpose, *ids: int) -> int:
    """Compute one 63-bit number of a purpose, in a microsecond; building a generator takes twenty.

    Chained splitmix64 (Steele, Lea and Flood 2014).
    """
    state = 0
    for key in (seed, int(purpose), *ids):
        state = (state + key + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
