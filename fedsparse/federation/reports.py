"""Reports of trained cohorts, gathered from all processes when a round closes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.update import NOT_FINITE, Update
from fedsparse.federation.exchange.wire.message import Size
from fedsparse.federation.stores.store import Kept


@dataclass(frozen=True)
class Dropped:
    """An update that was left out of the average, and the reason."""

    round: int
    client: int
    why: str = NOT_FINITE


@dataclass(frozen=True)
class Report:
    """The record of a cohort's training, without its update.

    Attributes:
        clients: ids of K clients that trained.
        group: K indices of global rows.
        up: K sizes of the sent messages.
        dropped: updates that were left out.
        kept: what clients store, by the store's name: their ids, and a row each.
        local_steps: sum over the clients.
        clipped: local steps whose gradient was clipped.

    """

    clients: tuple[int, ...]
    group: tuple[int, ...]
    up: tuple[Size, ...]
    dropped: tuple[Dropped, ...]
    kept: Kept
    local_steps: int = 0
    clipped: int = 0

    @classmethod
    def of(cls, number: int, received: Update, group: tuple[int, ...], sizes: tuple[Size, ...], kept: Kept) -> Report:
        """Build the report of an update as the server received it, and of what its clients store; without padding."""
        members = [k for k, client in enumerate(received.clients) if client >= 0]
        why = {k: received.refused[k] for k in members if k in received.refused}
        return cls(
            tuple(received.clients[k] for k in members),
            tuple(group[k] for k in members),
            tuple(sizes[k] for k in members),
            tuple(Dropped(number, received.clients[k], reason) for k, reason in why.items()),
            kept,
            received.local_steps,
            received.clipped,
        )

    def on_cpu(self) -> Report:
        """Copy the rows to the CPU, where other processes can read them."""
        copied = {name: (clients, rows.to("cpu", copy=True)) for name, (clients, rows) in self.kept.items()}
        return replace(self, kept=copied)


class EveryUpdateDropped(Diverged):
    """All updates of a round were left out."""

    @classmethod
    def of(cls, round: int, dropped: Sequence[Dropped], key: str) -> EveryUpdateDropped:
        """Build the error of a round; ``key`` is the config key of the clients' learning rate."""
        refused = next((drop for drop in dropped if drop.why != NOT_FINITE), None)
        if refused is not None:
            return cls(f"round {round + 1}: no update counts, so the run stops; client {refused.client}: {refused.why}")
        head = "; of a probed head, a smaller calibration.head_lr" if round == 0 else ""
        return cls(
            f"round {round + 1}: the loss or update of every client became NaN or infinite, so the run stops; "
            f"try a smaller {key}, or optimizer.clip_norm=1.0{head}"
        )


def named(dropped: Sequence[Dropped]) -> list[str]:
    """List the clients that were left out, one line for each reason.

    >>> named([Dropped(0, 4, "it is late"), Dropped(0, 7, "it is late")])
    ['clients 4, 7 are left out: it is late']
    """
    reasons = dict.fromkeys(drop.why for drop in dropped)
    return [left_out((drop.client for drop in dropped if drop.why == why), why) for why in reasons]


def left_out(clients: Iterable[int], why: str) -> str:
    """Word one line: these clients are left out, and why."""
    listed = sorted(clients)
    who = f"client {listed[0]} is" if len(listed) == 1 else f"clients {', '.join(map(str, listed))} are"
    return f"{who} left out: {why}"
