"""Sampling of the clients of a round: pure functions of (seed, round)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedsparse.core.seeding import Purpose, generator


def participants(per_round: float | int, num_clients: int, key: str = "federation.clients_per_round") -> int:
    """Turn ``federation.clients_per_round`` into a number of clients.

    Args:
        per_round: a count of clients if an integer, a fraction of them in (0, 1] if a float.
        num_clients: clients of the federation.
        key: config key of the option.

    Raises:
        ValueError: the count is outside [1, num_clients], or the fraction outside (0, 1].

    >>> participants(0.5, 20), participants(3, 20), participants(1.0, 20)
    (10, 3, 20)
    """
    if isinstance(per_round, int) and not isinstance(per_round, bool) and 1 <= per_round <= num_clients:
        return per_round
    if isinstance(per_round, float) and 0 < per_round <= 1:
        return max(1, math.floor(per_round * num_clients + 0.5))
    raise ValueError(
        f"{key} is {per_round!r}; it must be a count from 1 to {num_clients}, or a fraction above 0 and up to 1.0"
    )


def uniform(
    round: int, *, eligible: Sequence[int], count: int, seed: int, purpose: Purpose = Purpose.SAMPLING
) -> list[int]:
    """Draw ``count`` of the eligible clients, each equally likely, without replacement (McMahan et al. 2017).

    Args:
        round: index of the round.
        eligible: ids of the clients that hold data.
        count: clients to draw; all are taken if fewer are eligible.
        seed: the run's seed.
        purpose: stream of random numbers.

    """
    chosen = generator(seed, purpose, round).choice(len(eligible), size=min(count, len(eligible)), replace=False)
    return [eligible[i] for i in chosen]


def everyone(
    round: int, *, eligible: Sequence[int], count: int, seed: int, purpose: Purpose = Purpose.SAMPLING
) -> list[int]:
    """Choose every client with data in every round (cross-silo); ``count`` is ignored."""
    return list(eligible)
