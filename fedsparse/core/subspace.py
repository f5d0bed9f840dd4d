"""The subspace of coordinates that train, and how values of each are carried over to another mask.

Shapes: P coordinates of the space, n of them train; * any dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 1 << 17  # coordinates at once on a CPU: they fit in its cache, and temporary copies need no second row


class Subspace:
    """The n coordinates that train, of rows with P.

    Args:
        mask: bool (P,), True where a coordinate trains; kept, not copied.

    Attributes:
        index: (n,), ascending positions; None if everything trains.
        total: P.
        size: n.

    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.index = None if bool(mask.all()) else narrow(mask.nonzero().squeeze(1), len(mask))
        self.total = len(mask)
        self.size = len(mask) if self.index is None else len(self.index)

    def of(self, rows: Tensor) -> Tensor:
        """Gather the trained values (*, n) of rows (*, P); the rows themselves if everything trains."""
        return rows if self.index is None else rows.index_select(-1, self.index)

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor) -> None:
        """Write trained values (*, n) into rows (*, P), in place."""
        rows.copy_(values) if self.index is None else rows.index_copy_(-1, self.index.long(), values)

    def spread(self, values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """Spread values (*, n) over all coordinates, (*, P), with ``elsewhere`` at frozen ones."""
        if self.index is None:
            return values
        whole = torch.full((*values.shape[:-1], self.total), elsewhere, dtype=values.dtype, device=values.device)
        return whole.index_copy_(-1, self.index.to(values.device).long(), values)


@dataclass(frozen=True)
class Carry:
    """The change from one mask to another, which carries values of trained coordinates over.

    The value of a coordinate that stops training is dropped, and one that starts to train gets a new value.

    Attributes:
        before: coordinates that trained.
        after: coordinates that train now.
        round: the first round with the new mask.
        zeros: whether coordinates that stop become zero.

    >>> marks = torch.tensor([[True, True, False], [False, True, True]])
    >>> Carry(Subspace(marks[0]), Subspace(marks[1]))(torch.tensor([1.0, 2.0]))
    tensor([2., 0.])
    """

    before: Subspace
    after: Subspace
    round: int = 0
    zeros: bool = False

    def __call__(self, values: Tensor, new: float = 0.0) -> Tensor:
        """Carry values (*, n of before) over: (*, n of after), ``new`` where a coordinate starts to train."""
        whole = self.before.spread(values, new)
        index = self.after.index
        return whole.clone() if index is None else whole.index_select(-1, index.to(whole.device))

    def within(self, marks: Tensor) -> Carry:
        """Restrict both subspaces to some coordinates: bool (P,)."""
        pair = [Subspace(part.mask & marks.to(part.mask.device)) for part in (self.before, self.after)]
        return replace(self, before=pair[0], after=pair[1])


def where_true(marks: Tensor, count: int) -> Tensor:
    """List the positions of ``count`` marks, bool (n,) -> int64 (count,); the host, which counted, does not wait.

    >>> where_true(torch.tensor([False, True, True]), 2)
    tensor([1, 2])
    """
    if marks.device.type == "cpu":
        return marks.nonzero().squeeze(1)
    return torch.searchsorted(marks.cumsum(0), torch.arange(1, count + 1, device=marks.device))


def narrow(index: Tensor, total: int) -> Tensor:
    """Convert positions below ``total`` to int32, or to int64 if ``total`` needs it."""
    return index.to(torch.int32 if total < 1 << 31 else torch.int64)
