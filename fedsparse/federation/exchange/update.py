"""What the server sends the clients of a cohort, what they changed, what of that is on its way back, and what counts.

An update that is not finite, or claims more than the server knows of its client, is refused.

Shapes: K clients of the cohort, P coordinates of which n train, Q buffer values. Rows hold trained coordinates only:
nothing else can change. Nothing here knows of the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsparse.federation.exchange.wire.message import Size
from fedsparse.federation.stores.store import Kept

NOT_FINITE = "NaN or infinity in loss or update"


@dataclass(frozen=True)
class Start:
    """What the server sends K clients.

    Attributes:
        values: (K, n) where each starts.
        lr: their learning rate in this round.
        group: the global row that each starts from.
        patience: epochs without a better loss after which a client stops; None: none stops early.
        epochs: passes over its samples that a client makes, which ``patience`` counts.

    """

    values: Tensor
    lr: float
    group: tuple[int, ...]
    patience: int | None = None
    epochs: int = 1


@dataclass(frozen=True)
class Update:
    """What K clients changed in a round.

    Attributes:
        clients: K ids; below 0 is a padding row.
        rows: (K, n) change of each coordinate that trains; the next cohort's may lie in the same memory.
        buffers: (K, Q) change of the float buffers.
        weight: K weights in the average.
        loss: K mean training losses.
        sent: bool (K, n), which coordinates each client sent, where that differs between them; None: all alike.
        start: (K, n) values that the clients started from, which both sides know; None where nothing reads them.
        values: (K, n) values that training ended with: start plus change is rounded once more. None where nobody said.
        round: the round.
        steps: K sums of step weights (``drift.step_weight``); empty where nobody said.
        variates: (K, n) what an objective sends of each coordinate that trains, never rounded; None: nothing.
        dtype: of the values on the wire; None for the rows' own.
        refused: rows that do not count, which have weight 0, and why.
        kept: what the clients keep for themselves if their update counts: their ids, and a row each, by the store.
        local_steps: that they took, all together.
        clipped: how many of these had their gradient clipped.

    """

    clients: tuple[int, ...]
    rows: Tensor
    buffers: Tensor
    weight: tuple[float, ...]
    loss: tuple[float, ...]
    sent: Tensor | None = None
    start: Tensor | None = None
    values: Tensor | None = None
    round: int = 0
    steps: tuple[float, ...] = ()
    variates: Tensor | None = None
    dtype: torch.dtype | None = None
    refused: Mapping[int, str] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    local_steps: int = 0
    clipped: int = 0

    @property
    def extra(self) -> int:
        """Values that each client sends beside its row, exactly: buffers and variates."""
        return self.buffers.shape[1] + (0 if self.variates is None else self.variates.shape[1])

    @property
    def start_values(self) -> Tensor:
        """Values (K, n) that the clients started from; zeros without ``start``."""
        return torch.zeros_like(self.rows) if self.start is None else self.start


@dataclass(frozen=True)
class Payload:
    """What K clients send.

    Where both sides know the positions and no value is rounded, the values stay where they are, and the lengths are
    those that the messages would have: a simulation need not copy every update to the host to count it.

    Attributes:
        update: the update without its rows, if there are messages; else with what is sent in them.
        sizes: bytes of each client's message.
        written: the messages, or empty where they need not be written.
        kept: what the clients keep of what they did not send, as ``Update.kept``.

    """

    update: Update
    sizes: tuple[Size, ...]
    written: tuple[bytes, ...] = ()
    kept: Kept = field(default_factory=dict)


def counted(update: Update) -> list[int]:
    """Rows whose update counts: neither padding nor refused."""
    return [k for k, weight in enumerate(update.weight) if weight > 0]


def finite(update: Update) -> Update:
    """Refuse updates of which rows, buffers or loss are not finite."""
    pairs = enumerate(zip(finite_rows(update.rows, update.buffers), update.loss, strict=True))
    why = {k: NOT_FINITE for k, (good, loss) in pairs if not (good and math.isfinite(loss))}
    return refuse(update, why) if why else update


def finite_rows(first: Tensor, *others: Tensor) -> list[bool]:
    """Say of K rows, in parts (K, *), which are finite; the host waits for the device once, unless a sum is not."""
    sums = first.sum(1)
    for part in others:
        sums = sums + part.sum(1) if part.shape[1] else sums
    parts = (first, *others)  # huge values are finite one by one, and their sum may not be
    return [math.isfinite(s) or all(bool(p[k].isfinite().all()) for p in parts) for k, s in enumerate(sums.tolist())]


def of_those(kept: Kept, update: Update) -> Kept:
    """Of what clients would keep, on the host: the finite rows of those whose update counts."""
    those = {update.clients[k] for k in counted(update)}
    found = {}
    for name, (clients, rows) in kept.items():
        rows = rows.cpu()
        good = [k for k, whole in enumerate(finite_rows(rows)) if whole and clients[k] in those]
        found[name] = (tuple(clients[k] for k in good), rows[good])
    return found


def admit(received: Update, weight: Sequence[float], between: bool) -> Update:
    """Refuse what cannot be true of a client, or cannot be averaged.

    A weight must be above 0, and at most the known one: the samples that the server knows the client to hold, those
    that it asked it to process, or 1 (``federation.weight``). A loss may be negative: it may be of a user's own.

    Args:
        received: what clients sent.
        weight: what the server knows of their weights without being told.
        between: whether anything has changed the values since the clients looked whether they are finite.

    """
    pairs = enumerate(zip(received.weight, weight, strict=True))
    claims = {k: _claims(a, b) for k, (a, b) in pairs if not (0 < a <= b or a == 0 == b)}
    admitted = refuse(received, claims) if claims else received
    return finite(admitted) if between else admitted


def _claims(weight: float, limit: float) -> str:
    return f"a weight of {weight:g}, where at most {limit:g} can be"


def refuse(update: Update, why: Mapping[int, str]) -> Update:
    """Leave rows out: by selection, so that NaN never reaches a sum; what they were refused for first stays noted."""
    good = [k not in why for k in range(len(update.clients))]
    keep = torch.tensor(good, device=update.rows.device).unsqueeze(1)
    return replace(
        update,
        rows=torch.where(keep, update.rows, 0.0),
        buffers=torch.where(keep, update.buffers, 0.0),
        values=None if update.values is None else torch.where(keep, update.values, update.start_values),
        weight=tuple(w if g else 0.0 for w, g in zip(update.weight, good, strict=True)),
        loss=tuple(v if g else 0.0 for v, g in zip(update.loss, good, strict=True)),
        refused={**why, **update.refused},
    )
