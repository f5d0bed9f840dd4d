"""Several processes: each trains other clients of the same round, and all hold the same global row.

The first process leads: it prepares, writes and reports; the others follow. What one of them knows and all need goes
through ``share`` and ``gather``, which in a single process cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def joined() -> bool:
    """Whether this process is one of several that have met."""
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """Count the processes that have met."""
    return distributed.get_world_size() if joined() else 1


def process() -> int:
    """Place of this process among them; 0 leads."""
    return distributed.get_rank() if joined() else 0


def share(value: T | None = None) -> T | None:
    """Hand a value of the leading process to all; each returns it."""
    if not joined():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Collect the values of all processes, in their order."""
    if not joined():
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
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
