"""Which updates count: one that is not finite, or claims more than the server knows of its client, is refused.

Shapes: K clients of the cohort, n coordinates that train, Q buffer values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsparse.federation.exchange.update import Update
from fedsparse.federation.stores.store import Kept

NOT_FINITE = "NaN or infinity in loss or update"


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


def _claims(weight: float, known: float) -> str:
    return f"a weight of {weight:g}, where at most {known:g} can be"


def refuse(update: Update, why: Mapping[int, str]) -> Update:
    """Leave rows out: by selection, so that NaN never reaches a sum; what they were refused for first stays noted."""
    good = [k not in why for k in range(len(update.clients))]
    keep = torch.tensor(good, device=update.rows.device).unsqueeze(1)
    return replace(
        update,
        rows=torch.where(keep, update.rows, 0.0),
        buffers=torch.where(keep, update.buffers, 0.0),
        values=None if update.values is None else torch.where(keep, update.values, update.start),
        weight=tuple(w if g else 0.0 for w, g in zip(update.weight, good, strict=True)),
        loss=tuple(v if g else 0.0 for v, g in zip(update.loss, good, strict=True)),
        refused={**why, **update.refused},
    )
