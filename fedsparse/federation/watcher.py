"""Watchers observe each round and change nothing in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsparse.federation.exchange.update import Update
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change

if TYPE_CHECKING:
    from fedsparse.federation.round import Round


class Watcher:
    """Hooks of a round, which do nothing here: a subclass overrides those that it needs."""

    def open(self, round: Round) -> None:
        """Called when a round opens, after its mask is chosen."""

    def receive(self, round: Round, trained: Update, received: Update) -> None:
        """Called with each update of a cohort of this process.

        Args:
            round: the round.
            trained: as the clients computed it; only a simulation has it.
            received: as the server decoded it.

        """

    def step(self, round: Round) -> None:
        """Called when all updates of a round are there, before the server's step."""

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Called when a round closes, after the server's step.

        Args:
            round: the round.
            reports: of all cohorts of all processes.
            change: the mean change; of an exploration its rows are empty.

        """

    def figures(self) -> dict[str, float]:
        """Figures of the last closed round, for the log."""
        return {}
