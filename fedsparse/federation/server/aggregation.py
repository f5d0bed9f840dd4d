"""Aggregation of updates to one change per group. G groups, n coordinates that train, Q buffer values.

Means are additive, so that clients can be added in cohorts of any size and in several processes. Robust averages need
all rows of a round at once: their memory grows with the clients, and processes gather the rows when a round closes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.core import parallel
from fedsparse.core.checks import check_choice, check_whole
from fedsparse.core.subspace import CHUNK
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.server.robust import DENOMINATORS, Averaged, krum, multi_krum

AverageRows = Callable[[Tensor, Tensor, Tensor], Averaged]


@dataclass(frozen=True)
class Change:
    """The mean change of a round.

    Attributes:
        rows: (G, n) mean change, zero for a group without updates.
        buffers: (G, Q) mean change of the float buffers.
        touched: bool (G, n), coordinates that some client sent; None for all.
        loss: mean training loss over the clients.
        sent: of each group, whether it received an update.

    """

    rows: Tensor
    buffers: Tensor
    touched: Tensor | None
    loss: float
    sent: tuple[bool, ...]


class Tally:
    """Sums of a round: rows in float64 on the device, scalars on the host; one vector joins them for an all-reduce.

    Args:
        groups: G.
        size: n.
        buffers: Q.
        device: where the sums are kept.
        per_coordinate: whether clients send different coordinates, so that weights are summed for each coordinate too.
        block: clients of a group whose rows are first summed in float32; 1: each is added in float64.

    Attributes:
        parts: float32 (G, n), sums of the open blocks; None without blocks.
        open: of each group, how many clients its open block has.
        layout: all arguments but the last, by which a round finds whether it can take the memory of the one before.

    """

    def __init__(
        self,
        groups: int,
        size: int,
        buffers: int,
        device: torch.device,
        per_coordinate: bool = False,
        block: int = 1,
    ) -> None:
        self.block, self.open = block, [0] * groups
        self.parts = torch.zeros(groups, size, device=device) if block > 1 else None
        self.layout = groups, size, buffers, device, per_coordinate
        sizes = [groups * size, groups * buffers, groups * size * per_coordinate, 2 * groups + 1]
        self.vector = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        rows, extra, senders, self.numbers = self.vector.split(sizes)
        self.rows, self.buffers = rows.view(groups, size), extra.view(groups, buffers)
        self.senders = senders.view(groups, size) if per_coordinate else None
        self.weight, self.steps, self.loss = [0.0] * groups, [0.0] * groups, 0.0

    def restart(self) -> Tally:
        """Set all sums to 0, in place: new memory would be mapped page by page."""
        if self.parts is not None:
            self.close_blocks()
        self.vector.zero_()
        self.weight, self.steps, self.loss = [0.0] * len(self.weight), [0.0] * len(self.weight), 0.0
        return self

    def add_to_block(self, parts: Tensor, group: int, row: Tensor, weight: float) -> None:
        """Add a row times a weight to the open block of a group, and a full block to the sum."""
        parts[group].add_(row, alpha=weight)
        self.open[group] += 1
        if self.open[group] == self.block:
            self.close_blocks([group])

    def close_blocks(self, groups: Iterable[int] | None = None) -> None:
        """Add the open blocks of some groups, by default of all, to the sums."""
        for group in range(len(self.open)) if groups is None else groups:
            if self.parts is not None and self.open[group]:
                add_scaled(self.rows[group], self.parts[group], 1.0)
                self.parts[group].zero_()
                self.open[group] = 0

    def count(self, group: int, update: Update, k: int) -> None:
        """Add a client's weight, and its loss and steps times the weight."""
        weight = update.weight[k]
        self.weight[group] += weight
        self.loss += weight * update.loss[k]
        self.steps[group] += weight * update.steps[k] if update.steps else 0.0

    def all_reduce(self) -> None:
        """Sum over processes in one all-reduce."""
        self.close_blocks()
        groups = len(self.weight)
        self.numbers.copy_(torch.tensor([*self.weight, *self.steps, self.loss], dtype=torch.float64))
        torch.distributed.all_reduce(self.vector)
        *both, self.loss = self.numbers.tolist()
        self.weight, self.steps = both[:groups], both[groups:]

    def change(self, rows: Tensor, touched: Tensor | None) -> Change:
        """Build the change from mean changes of the rows (G, n); buffers and loss are averaged by weight."""
        weight = self.rows.new_tensor(self.weight).unsqueeze(1)
        buffers = self.buffers / torch.where(weight > 0, weight, 1.0)
        sent = tuple(total > 0 for total in self.weight)
        return Change(rows, buffers, touched, self.loss / sum(self.weight), sent)


def add_scaled(total: Tensor, row: Tensor, weight: float, chunk: int = CHUNK) -> None:
    """Add a row times a weight to a float64 sum; in chunks on a CPU, where torch copies the row to float64."""
    size = chunk if total.device.type == "cpu" else max(1, len(total))
    if len(total) <= size:
        total.add_(row, alpha=weight)
        return
    for part, values in zip(total.split(size), row.split(size), strict=True):
        part.add_(values, alpha=weight)


class Aggregation(Protocol):
    """Averages the updates of a round.

    Attributes:
        denominator: ``senders`` or ``participants``, over which each coordinate is averaged; empty if neither applies.

    """

    denominator: str

    def zero(self, groups: int, size: int, buffers: int, device: torch.device, per_coordinate: bool = False) -> Tally:
        """Start a round; ``per_coordinate`` if clients send different coordinates."""

    def add(self, tally: Tally, update: Update, group: Sequence[int]) -> None:
        """Add K updates; a client of weight 0 adds nothing."""

    def merge(self, tally: Tally) -> Tally:
        """Combine the tallies of all processes."""

    def finish(self, tally: Tally) -> Change | None:
        """Compute the mean change; None without updates."""


class WeightedMean:
    r"""Average of the updates by weight, :math:`\sum_k w_k \Delta_k / \sum_k w_k` (FedAvg, McMahan et al. 2017).

    Args:
        denominator: if clients send different coordinates, each is averaged over its ``senders``, or over all
            ``participants`` of the round, where an unsent coordinate is a change of 0.
        block: clients whose rows are first summed in float32, and that sum in float64, which reads and writes less
            memory; 1: each row is added in float64. With more, several processes agree to rounding only: each closes
            its own blocks.

    Raises:
        ValueError: an unknown denominator, or a block below 1.

    """

    per_step = False  # whether a client's change is divided by its steps

    def __init__(self, denominator: str = "senders", block: int = 1) -> None:
        check_choice("aggregation.denominator", denominator, *DENOMINATORS)
        check_whole("aggregation.block", block, 1)
        self.denominator, self.block = denominator, block

    def zero(self, groups: int, size: int, buffers: int, device: torch.device, per_coordinate: bool = False) -> Tally:
        """Start a round with sums of 0."""
        return Tally(groups, size, buffers, device, per_coordinate, self.block)

    def add(self, tally: Tally, update: Update, group: Sequence[int]) -> None:
        """Add w * rows in client order, so that the cohort size does not change the order of summation."""
        for k, (weight, g) in enumerate(zip(update.weight, group, strict=True)):
            if weight > 0:
                scale = weight / update.steps[k] if self.per_step else weight
                if tally.parts is None:
                    add_scaled(tally.rows[g], update.rows[k], scale)
                else:
                    tally.add_to_block(tally.parts, g, update.rows[k], scale)
                tally.count(g, update, k)
                if update.buffers.numel():
                    tally.buffers[g].add_(update.buffers[k], alpha=weight)
                if tally.senders is not None and update.sent is not None:
                    tally.senders[g].add_(update.sent[k], alpha=weight)

    def merge(self, tally: Tally) -> Tally:
        """Sum over processes, if there are several."""
        if parallel.joined():
            tally.all_reduce()
        return tally

    def finish(self, tally: Tally) -> Change | None:
        """Divide by the weights."""
        if sum(tally.weight) == 0:
            return None
        if tally.parts is not None:
            tally.close_blocks()
        weight = tally.rows.new_tensor(tally.weight).unsqueeze(1)
        divisor = torch.where(weight > 0, weight, 1.0)
        if tally.senders is None:  # in place: the tally is not used again
            touched = None if all(tally.weight) else (weight > 0).expand_as(tally.rows)
            return tally.change(tally.rows.div_(divisor), touched)
        touched = tally.senders > 0
        if self.denominator == "senders":
            divisor = torch.where(touched, tally.senders, 1.0)
        return tally.change(tally.rows / divisor, touched)


class FedNova(WeightedMean):
    r"""Average of the updates per step, times the mean number of steps (Wang et al. 2020, equation 6).

    A client's number of steps is :math:`\lVert a_k \rVert_1`, the sum of its step weights, momentum included. So
    clients with more steps do not bias the model towards their objective.
    """

    per_step = True

    def finish(self, tally: Tally) -> Change | None:
        """Average, and scale by the mean of the sums of step weights."""
        change = super().finish(tally)
        if change is not None:
            pairs = zip(tally.steps, tally.weight, strict=True)
            mean = [steps / weight if weight else 0.0 for steps, weight in pairs]
            change.rows.mul_(change.rows.new_tensor(mean).unsqueeze(1))
        return change


@dataclass(frozen=True)
class Kept:
    """An update that a robust average holds until the round closes.

    Attributes:
        client: its id.
        group: index of the global row.
        weight: in the average.
        row: (n + Q,), change of coordinates and buffers; NaN if the update was refused.
        sent: bool (n + Q,), entries that were sent.

    """

    client: int
    group: int
    weight: float
    row: Tensor
    sent: Tensor


class RowTally(Tally):
    """Sums of weights, losses and steps, and all rows of a round."""

    def __init__(self, groups: int, buffers: int, size: int, device: torch.device) -> None:
        super().__init__(groups, 0, 0, device)
        self.size, self.extra, self.device = size, buffers, device
        self.kept: list[Kept] = []

    def all_gather(self) -> None:
        """Gather the rows of all processes, in the order of their clients."""
        everyone = parallel.gather(self.kept)
        self.kept = sorted((row for rows in everyone for row in rows), key=lambda row: row.client)


class Robust:
    """A robust average of the rows of each group, and of their buffers, by one of the functions of ``robust``.

    Functions that pick whole rows compare coordinates only, and take the buffers of the picked rows. A refused update
    is passed on as a row of NaN: it counts as one of the attackers that the function assumes.

    Args:
        average: values (K, n), sent bool (K, n), weight (K,) -> mean (n,), touched bool (n,).

    """

    denominator = ""

    def __init__(self, average: AverageRows) -> None:
        self.average = average
        self.picks = (average.func if isinstance(average, partial) else average) in (krum, multi_krum)

    def zero(
        self, groups: int, size: int, buffers: int, device: torch.device, per_coordinate: bool = False
    ) -> RowTally:
        """Start a round without rows."""
        return RowTally(groups, buffers, size, device)

    def add(self, tally: RowTally, update: Update, group: Sequence[int]) -> None:
        """Keep the rows of admitted updates, and a row of NaN for each refused one."""
        for k, (client, weight, g) in enumerate(zip(update.clients, update.weight, group, strict=True)):
            if weight > 0 or (client >= 0 and k in update.refused):
                row = torch.cat([update.rows[k], update.buffers[k]]).cpu()
                sent = torch.ones(row.shape, dtype=torch.bool)
                if update.sent is not None:
                    sent[: tally.size] = update.sent[k].cpu()
                if weight > 0:
                    tally.count(g, update, k)
                    tally.kept.append(Kept(client, g, weight, row, sent))
                else:
                    tally.kept.append(Kept(client, g, 1.0, torch.full_like(row, math.nan), torch.ones_like(sent)))

    def merge(self, tally: RowTally) -> RowTally:
        """Gather the rows of all processes, in the order of their clients."""
        if parallel.joined():
            tally.all_reduce()
        tally.all_gather()
        return tally

    def finish(self, tally: RowTally) -> Change | None:
        """Average the rows of each group."""
        if sum(tally.weight) == 0:
            return None
        averaged = [self._group(tally, g) for g in range(len(tally.weight))]
        every, touched = (torch.stack(parts).to(tally.device) for parts in zip(*averaged, strict=True))
        rows, buffers = every.split([tally.size, tally.extra], 1)
        touched = touched[:, : tally.size]
        return replace(tally.change(rows, None if bool(touched.all()) else touched), buffers=buffers)

    def _group(self, tally: RowTally, group: int) -> Averaged:
        """Average coordinates and buffers of one group: (n + Q,)."""
        kept, sizes = [row for row in tally.kept if row.group == group], [tally.size, tally.extra]
        if not kept:
            return torch.zeros(sum(sizes), dtype=torch.float64), torch.zeros(sum(sizes), dtype=torch.bool)
        weight = torch.tensor([row.weight for row in kept], dtype=torch.float64)
        values, sent = torch.stack([row.row for row in kept]), torch.stack([row.sent for row in kept])
        if not tally.extra:
            return self.average(values, sent, weight)
        if self.picks:
            return self.average(values, sent, weight, by=tally.size)  # type: ignore[call-arg]
        parts = zip(values.split(sizes, 1), sent.split(sizes, 1), strict=True)
        means = [self.average(value, marks, weight) for value, marks in parts]
        rows, touched = (torch.cat(part) for part in zip(*means, strict=True))
        return rows, touched
