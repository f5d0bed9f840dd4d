"""Which global row each client starts from and adds to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Topology(Protocol):
    """Groups of clients, each with a global row of its own."""

    @property
    def groups(self) -> int:
        """Number of global rows G."""

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """For each of K clients the global row (0 to G - 1) it starts from and adds to."""


class Flat:
    """One global model for all clients."""

    groups = 1

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Everybody belongs to row 0."""
        return (0,) * len(clients)
