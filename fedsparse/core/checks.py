"""Checks of option values; an invalid one is a ValueError of one line with its config key."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DOUBLE = sys.float_info.max
LARGEST = (2 - 2**-23) * 2.0**127  # of float32, the dtype of rows and rates, where a larger number is infinite


def finite(value: Any, largest: float = LARGEST) -> bool:
    """Whether a value is a number of at most this magnitude, by default finite as float32; a bool is no number."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) <= largest)  # type: ignore


def check_number(
    key: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    null: bool = False,
    word: str | None = None,
    double: bool = False,
) -> None:
    """Refuse a value that is not a finite number within bounds.

    Args:
        key: config key.
        value: of the option.
        least: inclusive lower bound.
        above: exclusive lower bound.
        most: inclusive upper bound.
        below: exclusive upper bound.
        whole: whether it must be an integer.
        null: whether None is valid too.
        word: a string that is valid too.
        double: whether the number stays float64, and may exceed float32's range.

    Raises:
        ValueError: one line with the key, the value and the valid values.

    >>> check_number("link.latency", -1, least=0)
    Traceback (most recent call last):
    ValueError: link.latency is -1; it must be a finite number of 0 or more
    >>> check_number("federation.cohort", 0, whole=True, least=1, most=20, word="auto")
    Traceback (most recent call last):
    ValueError: federation.cohort is 0; it must be auto, or a whole number from 1 to 20
    """
    whole_number = isinstance(value, Integral) and not isinstance(value, bool)
    good = whole_number if whole else finite(value, DOUBLE if double else LARGEST)
    outside = good and (
        (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    )
    if (null and value is None) or (isinstance(value, str) and value == word) or (good and not outside):
        return
    if least is not None and most is not None:
        bounds = [f"from {least} to {most}"]
    else:
        bounds = [] if least is None else [f"of {least} or more"]
        bounds += [] if above is None else [f"above {above}"]
        bounds += [] if most is None else [f"at most {most}"]
        bounds += [] if below is None else [f"below {below}"]
    others = [*(["null"] if null else []), *([] if word is None else [word])]
    kinds = [*others, f"{'or ' if others else ''}a {'whole' if whole else 'finite'} number"]
    raise ValueError(f"{key} is {value!r}; it must be {' '.join([', '.join(kinds), ' and '.join(bounds)]).strip()}")


def check_positive(key: str, value: Any) -> None:
    """Refuse a value that is not a finite number above 0."""
    check_number(key, value, above=0)


def check_not_negative(key: str, value: Any) -> None:
    """Refuse a value that is not a finite number of 0 or more."""
    check_number(key, value, least=0)


def check_share(key: str, value: Any) -> None:
    """Refuse a value that is not a number of at least 0 and below 1."""
    check_number(key, value, least=0, below=1)


def check_whole(key: str, value: Any, least: int) -> None:
    """Refuse a value that is not an integer of at least ``least``."""
    check_number(key, value, least=least, whole=True)


def check_flag(key: str, value: Any) -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        ValueError: one line with the key.

    """
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; it must be true or false")


def check_choice(key: str, value: Any, *choices: str | None) -> None:
    """Refuse a value that is none of the choices, which are strings and None.

    Raises:
        ValueError: one line with the key, the value and the choices.

    >>> check_choice("sparsity.mode", "cut", "freeze", "prune")
    Traceback (most recent call last):
    ValueError: sparsity.mode is 'cut'; it must be freeze or prune
    """
    if not (value is None or isinstance(value, str)) or value not in choices:
        *first, last = ["null" if choice is None else choice for choice in choices]
        raise ValueError(f"{key} is {value!r}; it must be {', '.join(first)} or {last}")


def check_tensors(name: str, tensors: Iterable[Tensor], real: bool = True) -> None:
    """Refuse parameters that an optimizer would step wrongly: sparse, integer or, by default, complex ones.

    Args:
        name: of the optimizer.
        tensors: its parameters.
        real: whether they must be real, as for an optimizer that squares gradients.

    Raises:
        ValueError: one line with the valid kinds.

    """
    import torch  # here, so that a configuration is checked without it

    for tensor in tensors:
        if tensor.layout != torch.strided or not (tensor.is_floating_point() or (tensor.is_complex() and not real)):
            kinds = "real" if real else "real or complex"
            said = f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"{name} needs dense parameters of {kinds} floating-point numbers, not {said}")


def two_decays(key: str, betas: Any) -> tuple[float, float]:
    """Check two decays, of any sequence type, and return them as a pair.

    Raises:
        ValueError: they are not two numbers in [0, 1); one line with the key.

    """
    values = tuple(betas) if isinstance(betas, Sequence) else ()
    if len(values) != 2 or not all(finite(beta) and 0 <= beta < 1 for beta in values):
        raise ValueError(f"{key} is {betas!r}; it must be two numbers of 0 or more and below 1")
    return values[0], values[1]
