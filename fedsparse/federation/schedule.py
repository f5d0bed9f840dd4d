"""The clients' learning rate over the rounds: pure functions of the round, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]


def constant(round: int, rounds: int) -> float:
    """Factor 1 in every round."""
    return 1.0


def cosine(round: int, rounds: int, *, floor: float = 0.0) -> float:
    """Half a cosine from 1 in the first round towards ``floor`` (Loshchilov and Hutter 2017).

    >>> [round(cosine(r, 4), 3) for r in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * round / max(1, rounds)))


def exponential(round: int, rounds: int, *, gamma: float = 0.99) -> float:
    """Factor ``gamma ** round``."""
    return gamma**round


def step(round: int, rounds: int, *, every: int = 30, gamma: float = 0.1) -> float:
    """Factor ``gamma`` after each ``every`` rounds.

    >>> step(29, 100), step(30, 100)
    (1.0, 0.1)
    """
    return gamma ** (round // every)
