"""Several processes: each trains other clients of the same round, and all hold the same global rows.

The first process leads: it prepares, writes and reports. ``share`` and ``gather`` exchange values between processes;
in a single process they return at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def joined() -> bool:
    """Whether torch's process group is initialised: this process is one of several."""
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """Number of processes, 1 without a process group."""
    return distributed.get_world_size() if joined() else 1


def process() -> int:
    """Rank of this process; 0 leads."""
    return distributed.get_rank() if joined() else 0


def share(value: T | None = None) -> T | None:
    """Broadcast the leading process's value, which every process returns."""
    if not joined():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Gather the values of all processes, by rank."""
    if not joined():
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within a ``with`` block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old
