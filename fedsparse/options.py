"""Ranges of the numbers that optimizers take; what lies outside is refused by its config key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


def finite(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(key: str, value: Any) -> None:
    """Refuse what is not a finite number above 0.

    Raises:
        ValueError: one line with the key.

    """
    if not (finite(value) and value > 0):
        raise ValueError(f"{key} must be a positive, finite number, not {value!r}")


def check_not_negative(key: str, value: Any) -> None:
    """Refuse what is not a finite number of 0 or more.

    Raises:
        ValueError: one line with the key.

    """
    if not (finite(value) and value >= 0):
        raise ValueError(f"{key} must be a finite number of 0 or more, not {value!r}")


def two_decays(key: str, betas: Any) -> tuple[float, float]:
    """Take any sequence of two decays as a pair.

    Raises:
        ValueError: they are not two numbers in [0, 1); one line with the key.

    """
    values = tuple(betas) if isinstance(betas, Sequence) else ()
    if len(values) != 2 or not all(finite(beta) and 0 <= beta < 1 for beta in values):
        raise ValueError(f"{key} must be two numbers of at least 0 and below 1, not {betas!r}")
    return values[0], values[1]
