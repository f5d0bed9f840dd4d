"""How updates become one change per group. G groups, n coordinates that train, Q buffer values.

Aggregations are additive, so that clients can stream through, in cohorts of any size and over several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.federation.exchange import Update
from fedsparse.places import CHUNK


@dataclass(frozen=True)
class Change:
    """What a round changes.

    Attributes:
        rows: (G, n) mean change, zero for a group that nobody sent to.
        buffers: (G, Q) mean change of the float buffers.
        touched: bool (G, n), which coordinates somebody sent, or None for all.
        loss: mean training loss over the clients.

    """

    rows: Tensor
    buffers: Tensor
    touched: Tensor | None
    loss: float


class Tally:
    """Sums of a round. What the host knows is summed there, and joins the rows in one float64 vector to be merged.

    Args:
        groups: G.
        size: n.
        buffers: Q.
        device: where the sums are kept.
        own: whether clients send different coordinates, so that the weights of each are summed too.

    """

    def __init__(self, groups: int, size: int, buffers: int, device: torch.device, own: bool = False) -> None:
        sizes = [groups * size, groups * buffers, groups * size * own, groups + 1]
        self.vector = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        rows, extra, senders, self.numbers = self.vector.split(sizes)
        self.rows, self.buffers = rows.view(groups, size), extra.view(groups, buffers)
        self.senders = senders.view(groups, size) if own else None
        self.weight, self.loss = [0.0] * groups, 0.0

    def all_reduce(self) -> None:
        """Sum over processes, all in one call."""
        self.numbers.copy_(torch.tensor([*self.weight, self.loss], dtype=torch.float64))
        torch.distributed.all_reduce(self.vector)
        *self.weight, self.loss = self.numbers.tolist()


def add_scaled(total: Tensor, row: Tensor, weight: float) -> None:
    """Add a float32 row times a weight to a float64 sum; in chunks on a CPU, where torch first copies it to float64."""
    size = CHUNK if total.device.type == "cpu" else max(1, len(total))
    for part, values in zip(total.split(size), row.split(size), strict=True):
        part.add_(values, alpha=weight)


class Aggregation(Protocol):
    """Collects the updates of a round."""

    def zero(self, groups: int, size: int, buffers: int, device: torch.device, own: bool = False) -> Tally:
        """Start a round; ``own`` if clients send different coordinates."""

    def add(self, tally: Tally, update: Update, group: Sequence[int]) -> None:
        """Take in K updates; a client of weight 0 adds nothing."""

    def merge(self, tally: Tally) -> Tally:
        """Sum the tallies of all processes."""

    def finish(self, tally: Tally) -> Change | None:
        """Close a round; None if nobody sent."""


class WeightedMean:
    r"""Average of the updates by weight, :math:`\sum_k w_k \Delta_k / \sum_k w_k` (FedAvg, McMahan et al. 2017).

    Where clients send different coordinates, each is averaged over those who sent it; what nobody sent stays.
    """

    def zero(self, groups: int, size: int, buffers: int, device: torch.device, own: bool = False) -> Tally:
        """Start a round with empty sums."""
        return Tally(groups, size, buffers, device, own)

    def add(self, tally: Tally, update: Update, group: Sequence[int]) -> None:
        """Add w * rows in client order, so that the cohort size does not change the order of summation."""
        for k, (weight, g) in enumerate(zip(update.weight, group, strict=True)):
            if weight > 0:
                add_scaled(tally.rows[g], update.rows[k], weight)
                tally.weight[g] += weight
                tally.loss += weight * update.loss[k]
                if update.buffers.numel():
                    tally.buffers[g].add_(update.buffers[k], alpha=weight)
                if tally.senders is not None and update.sent is not None:
                    tally.senders[g].add_(update.sent[k], alpha=weight)

    def merge(self, tally: Tally) -> Tally:
        """Sum over processes; nothing to do in one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            tally.all_reduce()
        return tally

    def finish(self, tally: Tally) -> Change | None:
        """Divide by the weights."""
        total = sum(tally.weight)
        if total == 0:
            return None
        weight = tally.rows.new_tensor(tally.weight).unsqueeze(1)
        divisor = torch.where(weight > 0, weight, 1.0)
        touched = None if all(tally.weight) else (weight > 0).expand_as(tally.rows)
        if tally.senders is None:  # in place: the tally has served
            return Change(tally.rows.div_(divisor), tally.buffers / divisor, touched, tally.loss / total)
        touched = tally.senders > 0
        rows = tally.rows / torch.where(touched, tally.senders, 1.0)
        return Change(rows, tally.buffers / divisor, touched, tally.loss / total)
