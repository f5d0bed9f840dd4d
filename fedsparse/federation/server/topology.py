"""Topologies: the global row that each client starts from and is averaged into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Topology(Protocol):
    """Groups of clients, each with one global row."""

    @property
    def groups(self) -> int:
        """Number of global rows G."""

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Map K clients to the index (0 to G - 1) of their global row."""


class Flat:
    """One global row for all clients."""

    groups = 1

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Map all clients to row 0."""
        return (0,) * len(clients)
