"""Start, update and payload of a cohort, and the admission of updates to the average.

An update that is not finite, or claims a larger weight than the server derives, is refused.

Shapes: K clients of the cohort, P coordinates of which n train, Q buffer values. Rows have trained coordinates only:
no others can change. This module is independent of the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsparse.core.subspace import CHUNK
from fedsparse.federation.exchange.wire.message import Size
from fedsparse.federation.stores.store import Kept

NOT_FINITE = "NaN or infinity in loss or update"


@dataclass(frozen=True)
class Start:
    """The server's message to K clients.

    Attributes:
        values: (K, n) trained values that each starts from.
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
    """The update of K clients in a round.

    Attributes:
        clients: K ids; below 0 is a padding row.
        rows: (K, n) change of each trained coordinate; the next cohort may overwrite this memory.
        buffers: (K, Q) change of the float buffers.
        weight: K weights in the average.
        loss: K mean training losses.
        sent: bool (K, n), coordinates that each client sent; None if all sent the same.
        start: (K, n) values that the clients started from, which both sides know; None where nothing reads them.
        values: (K, n) values after training, as start plus change is rounded once more; None if unknown.
        round: the round, from 0.
        steps: K sums of step weights (``drift.step_weight``); empty if unknown.
        variates: (K, n) control variates, never rounded; None without.
        dtype: of the values on the wire; None for the rows' dtype.
        refused: by row, which then has weight 0, the reason of the refusal.
        kept: rows that the clients store if their update is admitted, by the store's name: ids, and a row each.
        local_steps: sum over the clients.
        clipped: local steps whose gradient was clipped.

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
        """Number of values that each client sends beside its row, unrounded: buffers and variates."""
        return self.buffers.shape[1] + (0 if self.variates is None else self.variates.shape[1])

    @property
    def start_values(self) -> Tensor:
        """Values (K, n) that the clients started from; zeros without ``start``."""
        return torch.zeros_like(self.rows) if self.start is None else self.start


@dataclass(frozen=True)
class Payload:
    """The messages of K clients.

    Both ends of a simulation are in one process: it computes what the messages would bring, and counts their bytes, so
    that no update is copied to the host to be written. Real messages, of ``Exchange.messages`` or from elsewhere, come
    before that: where there are any, the receiver reads nothing else.

    Attributes:
        update: the update as it is sent.
        sizes: bytes of each client's message.
        written: the messages; empty if none were written.
        kept: rows that filters store, as ``Update.kept``; all finite.
        arrived: the update as the receiver decodes it, without NaN and infinity, before it judges weights; None where
            only messages say it.

    """

    update: Update
    sizes: tuple[Size, ...]
    written: tuple[bytes, ...] = ()
    kept: Kept = field(default_factory=dict)
    arrived: Update | None = None


def counted(update: Update) -> list[int]:
    """List the rows of admitted updates: neither padding nor refused."""
    return [k for k, weight in enumerate(update.weight) if weight > 0]


def finite(update: Update, sums: Sequence[float] | None = None) -> Update:
    """Refuse updates whose row, buffers or loss are not finite; ``sums`` are those of ``row_sums``, if already read."""
    pairs = enumerate(zip(finite_rows(update.rows, update.buffers, sums=sums), update.loss, strict=True))
    why = {k: NOT_FINITE for k, (good, loss) in pairs if not (good and math.isfinite(loss))}
    return refuse(update, why) if why else update


def subtract(values: Tensor, start: Tensor, out: Tensor) -> Tensor:
    """Write the differences of K rows (K, n) into ``out``, and sum each, (K,): finite only if the row is.

    On a CPU in chunks, so that what is summed is still in its cache; one chunk is not split, which would take longer
    than the rest.
    """
    size = CHUNK if out.device.type == "cpu" else max(1, out.shape[1])
    if out.shape[1] <= size:
        return torch.sub(values, start, out=out).sum(1)
    parts = zip(*(rows.split(size, 1) for rows in (values, start, out)), strict=True)
    sums = [torch.sub(one, other, out=place).sum(1) for one, other, place in parts]
    return torch.stack(sums).sum(0)


def row_sums(first: Tensor, *others: Tensor) -> Tensor:
    """Sum each of K rows, in parts (K, *): (K,), which is finite only if the row is."""
    return sum((part.sum(1) for part in others if part.shape[1]), first.sum(1))


def finite_rows(first: Tensor, *others: Tensor, sums: Sequence[float] | None = None) -> list[bool]:
    """Test which of K rows, in parts (K, *), are finite.

    The host waits for the device once if all sums are finite, and not at all if it has read them (``row_sums``).
    """
    parts = (first, *others)  # huge values are finite one by one, and their sum may not be
    known = row_sums(*parts).tolist() if sums is None else sums
    return [math.isfinite(s) or all(bool(p[k].isfinite().all()) for p in parts) for k, s in enumerate(known)]


def of_those(kept: Kept, update: Update, known: bool = False) -> Kept:
    """Select the rows to store, where they are: the finite ones of clients with an admitted update.

    Args:
        kept: rows by the store's name.
        update: as it was received.
        known: whether all rows are known to be finite, so that the host need not wait for their device.

    """
    those = {update.clients[k] for k in counted(update)}
    found = {}
    for name, (clients, rows) in kept.items():
        whole = [True] * len(clients) if known else finite_rows(rows)
        good = [k for k, client in enumerate(clients) if whole[k] and client in those]
        found[name] = (tuple(clients[k] for k in good), rows if len(good) == len(clients) else rows[good])
    return found


def admit(received: Update, weight: Sequence[float], between: bool) -> Update:
    """Refuse updates with an impossible weight, and those that are not finite.

    A weight must be above 0 and at most the server's bound: the client's number of samples, the samples that it was to
    process, or 1 (``federation.weight``). A loss may be negative, as a user's loss can be.

    Args:
        received: the decoded update.
        weight: K upper bounds of the weights.
        between: whether values may have changed since the clients tested them for NaN and infinity.

    """
    pairs = enumerate(zip(received.weight, weight, strict=True))
    claims = {k: _claims(a, b) for k, (a, b) in pairs if not (0 < a <= b or a == 0 == b)}
    admitted = refuse(received, claims) if claims else received
    return finite(admitted) if between else admitted


def _claims(weight: float, limit: float) -> str:
    return f"a weight of {weight:g}, where at most {limit:g} can be"


def refuse(update: Update, why: Mapping[int, str]) -> Update:
    """Refuse rows: they become zero by selection, so that NaN never reaches a sum, and keep their first reason."""
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
