"""Ranges of the options that optimizers, schedules and mask rules take; what lies outside is refused by its key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def finite(value: Any) -> bool:
    """Whether a value is a number that float32 holds; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(-LARGEST <= value <= LARGEST)  # type: ignore[operator]


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


def check_share(key: str, value: Any) -> None:
    """Refuse what is not a number of at least 0 and below 1.

    Raises:
        ValueError: one line with the key.

    """
    if not (finite(value) and 0 <= value < 1):
        raise ValueError(f"{key} must be at least 0 and below 1, not {value!r}")


def check_flag(key: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: one line with the key.

    """
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")


def check_tensors(name: str, tensors: Iterable[Tensor], real: bool = True) -> None:
    """Refuse parameters that an optimizer's arithmetic is not for.

    Args:
        name: of the optimizer.
        tensors: its parameters.
        real: whether complex ones would be stepped wrongly, as by what squares gradients.

    Raises:
        ValueError: one line that says what they must be.

    """
    for tensor in tensors:
        if tensor.layout != torch.strided or not (tensor.is_floating_point() or (tensor.is_complex() and not real)):
            kinds = "real" if real else "real or complex"
            said = f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"{name} needs dense parameters of {kinds} floating-point numbers, not {said}")


def two_decays(key: str, betas: Any) -> tuple[float, float]:
    """Take any sequence of two decays as a pair.

    Raises:
        ValueError: they are not two numbers in [0, 1); one line with the key.

    """
    values = tuple(betas) if isinstance(betas, Sequence) else ()
    if len(values) != 2 or not all(finite(beta) and 0 <= beta < 1 for beta in values):
        raise ValueError(f"{key} must be two numbers of at least 0 and below 1, not {betas!r}")
    return values[0], values[1]
