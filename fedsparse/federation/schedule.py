"""Schedules of the clients' learning rate: pure functions of (round, rounds), so that a resume needs no state.

Within a round, of (local step, a client's number of local steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedsparse.core.checks import check_choice, check_not_negative, check_positive, check_whole

Schedule = Callable[[int, int], float]
Within = Callable[[int, int], float]
LOOKED_AT = 1000


def constant(round: int, rounds: int) -> float:
    """Factor 1 in every round."""
    return 1.0


def cosine(round: int, rounds: int, *, floor: float = 0.0) -> float:
    """Half a cosine from 1 in the first round towards ``floor`` (Loshchilov and Hutter 2017).

    >>> [round(cosine(r, 4), 3) for r in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    check_not_negative("schedule.floor", floor)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * round / max(1, rounds)))


def exponential(round: int, rounds: int, *, gamma: float = 0.99) -> float:
    """Factor ``gamma ** round``."""
    check_positive("schedule.gamma", gamma)
    return gamma**round


def step(round: int, rounds: int, *, every: int = 30, gamma: float = 0.1) -> float:
    """Factor ``gamma`` after each ``every`` rounds.

    >>> step(29, 100), step(30, 100)
    (1.0, 0.1)
    """
    check_whole("schedule.every", every, 1)
    check_positive("schedule.gamma", gamma)
    return gamma ** (round // every)


def linear(step: int, steps: int) -> float:
    """Fall in equal parts from 1 in a client's first local step (``schedule.within=linear``; Hugging Face's default).

    >>> [linear(s, 4) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    return 1.0 - step / steps


WITHIN: Mapping[str, Within | None] = {"constant": None, "linear": linear}


def within(name: str) -> Within | None:
    """Find the schedule within a round by its name; None keeps one learning rate.

    Raises:
        ValueError: an unknown name.

    """
    check_choice("schedule.within", name, *WITHIN)
    return WITHIN[name]


def few_rates(schedule: Schedule, rounds: int, most: int) -> bool:
    """Whether a schedule has at most so many factors in its rounds, of which the first ``LOOKED_AT`` are looked at.

    >>> few_rates(constant, 100, most=4), few_rates(step, 100, most=4), few_rates(cosine, 100, most=4)
    (True, True, False)
    """
    found = set[float]()
    for round in range(min(rounds, LOOKED_AT)):
        found.add(schedule(round, rounds))
        if len(found) > most:
            return False
    return True


def check_schedule(schedule: Schedule, rounds: int) -> None:
    """Check a schedule's factor in the first and in the last of so many rounds.

    Raises:
        ValueError: an option outside its range, or a factor that is negative or not finite; one line.

    """
    for round in (0, rounds - 1):
        try:
            factor = schedule(round, rounds)
        except OverflowError:
            factor = math.inf
        check_not_negative(f"the factor of optimizer.lr that schedule gives in round {round + 1}", factor)
