"""What a cohort's training leaves beside its update, for every process to know."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsparse.data.rounds import Cohort
from fedsparse.federation.update import Update
from fedsparse.federation.wire import Size


@dataclass(frozen=True)
class Dropped:
    """An update that was not finite and was left out."""

    round: int
    client: int


@dataclass(frozen=True)
class Report:
    """What a cohort's training leaves beside its update.

    Attributes:
        clients: who trained.
        up: bytes that each sent.
        dropped: updates that were left out.
        kept: what clients keep, by the store's name: their ids, and a row each.
        steps: local steps that they took, all together.
        clipped: how many of these had their gradient clipped.

    """

    clients: tuple[int, ...]
    up: tuple[Size, ...]
    dropped: tuple[Dropped, ...]
    kept: dict[str, tuple[tuple[int, ...], Tensor]]
    steps: int = 0
    clipped: int = 0


class EveryUpdateDropped(RuntimeError):
    """No client of a round sent a finite update: there is nothing to go on with."""

    def __init__(self, round: int) -> None:
        super().__init__(
            f"round {round + 1}: the loss or update of every client became NaN or infinite, so the run stops; "
            "try a smaller optimizer.lr, or optimizer.clip_norm=1.0"
        )


def counted(update: Update) -> list[int]:
    """Rows whose update counts: neither padding nor dropped."""
    return [k for k, weight in enumerate(update.weight) if weight > 0]


def finite(cohort: Cohort, update: Update, round: int) -> tuple[Update, tuple[Dropped, ...]]:
    """Drop updates that are not finite: by selection, so that NaN never reaches a tally; and say whose."""
    sums = update.rows.sum(1) + update.buffers.sum(1) if update.buffers.shape[1] else update.rows.sum(1)
    good = [math.isfinite(a) and math.isfinite(b) for a, b in zip(sums.tolist(), update.loss, strict=True)]
    if all(good):
        return update, ()
    dropped = tuple(Dropped(round, client) for row, client in cohort.members if not good[row])
    keep = torch.tensor(good, device=update.rows.device).unsqueeze(1)
    left = replace(
        update,
        rows=torch.where(keep, update.rows, 0.0),
        buffers=torch.where(keep, update.buffers, 0.0),
        weight=tuple(w if g else 0.0 for w, g in zip(update.weight, good, strict=True)),
        loss=tuple(v if g else 0.0 for v, g in zip(update.loss, good, strict=True)),
    )
    return left, dropped
