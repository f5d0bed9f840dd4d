"""Who only looks on: sees each round, and changes nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsparse.federation.exchange.update import Update
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change

if TYPE_CHECKING:
    from fedsparse.federation.round import Round


class Watcher:
    """Sees a round begin, its updates arrive, and it end; overrides what it needs."""

    def open(self, round: Round) -> None:
        """See a round begin, with the mask that it trains."""

    def receive(self, round: Round, received: Update) -> None:
        """See what arrived of a cohort of this process."""

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """See a round end: the reports of all cohorts, of all processes, and the mean change; none if it explored.

        The server has stepped already.
        """
