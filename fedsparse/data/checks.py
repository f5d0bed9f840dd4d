"""Checks of a partition's arguments: each function returns the value, or raises a ValueError of one line.

The errors name the option by its key (``federation.num_clients``), with valid values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import numpy.typing as npt

from fedsparse.core.checks import check_number, check_whole

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
NO_CLASS = -1  # label of all samples where targets are sequences


def checked_integer(name: str, value: object, least: int) -> int:
    """Return ``value`` as an int, or raise a ValueError that names the option unless it is an int >= ``least``."""
    check_whole(name, value, least)
    return int(value)  # type: ignore[call-overload]


def checked_labels(labels: npt.ArrayLike, name: str = "labels") -> Ints:
    """Return labels as int64 (n,), or raise a ValueError unless they are 1-D, not empty, and non-negative integers."""
    array = np.asarray(labels)
    if array.ndim == 1 and array.size and (array == NO_CLASS).all():
        raise ValueError(
            "the targets are sequences, without the classes that this partition deals by: set partition=natural or iid"
        )
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} have shape {array.shape}; give one label a sample, (n,), and at least one sample")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} are of type {array.dtype}; give integers")
    if array.min() < 0:
        raise ValueError(f"{name} go down to {array.min()}; give class numbers from 0")
    return array.astype(np.int64)


def checked_samples(labels: npt.ArrayLike) -> int:
    """Return the number of labels (n,), which may all be ``NO_CLASS``, or raise a ValueError as ``checked_labels``."""
    array = np.asarray(labels)
    without = array.ndim == 1 and array.size > 0 and bool((array == NO_CLASS).all())
    return array.size if without else checked_labels(array).size


def checked_clients(num_clients: int, samples: int) -> int:
    """Return the number of clients, or raise a ValueError unless 1 <= ``num_clients`` <= ``samples``."""
    clients = checked_integer("federation.num_clients", num_clients, 1)
    if clients > samples:
        raise ValueError(
            f"federation.num_clients is {clients} but data has {samples} samples; every client needs at least one"
        )
    return clients


def checked_positive(name: str, value: object) -> float:
    """Return ``value`` as a float, or raise a ValueError that names the option unless it is finite and above 0."""
    check_number(name, value, above=0, double=True)
    return float(value)  # type: ignore[arg-type]


def checked_minimum(min_size: int, num_clients: int, samples: int) -> int:
    """Return ``min_size``, or raise a ValueError when the data cannot give every client that many samples."""
    least = checked_integer("partition.min_size", min_size, 0)
    if least * num_clients > samples:
        raise ValueError(
            f"partition.min_size {least} for {num_clients} clients needs {least * num_clients} samples but data has "
            f"{samples}; lower partition.min_size or federation.num_clients"
        )
    return least


def checked_ratios(class_ratios: Sequence[Sequence[float]] | None, clients: int, classes: int) -> Floats:
    """Return class ratios (K, C), each row scaled to a largest of 1, from one row a client of one number a class."""
    if class_ratios is None:
        raise ValueError("partition=ratios needs partition.class_ratios: one list a client, of one number a class")
    if len(class_ratios) != clients:
        raise ValueError(
            f"partition.class_ratios has {len(class_ratios)} rows but federation.num_clients is {clients}; "
            "give one row a client"
        )
    rows = [_checked_row(f"partition.class_ratios[{i}]", list(row), classes) for i, row in enumerate(class_ratios)]
    weights = np.array(rows, dtype=np.float64)
    return np.asarray(weights / weights.max(axis=1, keepdims=True), dtype=np.float64)


def _checked_row(name: str, row: list[float], classes: int) -> list[float]:
    """Check the ratios of one client."""
    if len(row) != classes:
        raise ValueError(f"{name} has {len(row)} numbers; give one for each of the {classes} classes")
    if not all(isinstance(value, Real) and 0 <= value < math.inf for value in row) or max(row) == 0:
        raise ValueError(f"{name} is {row}; give finite numbers of at least 0, not all of them 0")
    return row


def checked_sizes(fractions: Sequence[float] | float | None, clients: int, samples: int) -> Ints:
    """Return the samples of every client (K,), floor(fraction * n), from one fraction a client or one for all."""
    if fractions is None:
        raise ValueError("partition=ratios needs partition.fractions: each client's share of the data, or one number")
    shares = [fractions] * clients if isinstance(fractions, Real) else list(fractions)  # type: ignore[arg-type]
    if len(shares) != clients:
        raise ValueError(
            f"partition.fractions has {len(shares)} numbers but federation.num_clients is {clients}; "
            "give one a client, or one number for all"
        )
    return np.array([checked_size(f"partition.fractions[{i}]", s, samples) for i, s in enumerate(shares)])


def checked_size(name: str, fraction: object, samples: int) -> int:
    """Convert a fraction to a number of samples, at least one, or raise a ValueError that names the option."""
    # 0.29 * 100 is 28.999999999999996 in floats: nudged, so that a whole product is not rounded down.
    size = math.floor(checked_positive(name, fraction) * samples + 1e-9)
    if not 1 <= size <= samples:
        raise ValueError(f"{name} is {fraction}; give at most 1, and enough for one of the {samples} samples")
    return size
