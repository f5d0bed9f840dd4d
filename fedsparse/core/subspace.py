"""What trains of the coordinates of a row, and how what is kept of each follows when that changes.

Shapes: P coordinates of the space, n of them train; * any dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 1 << 17  # coordinates at once on a CPU: they stay in its cache, and values and a long index need no second row


class Subspace:
    """The n of P coordinates that train, of rows that hold all P.

    Args:
        mask: bool (P,), True where a coordinate trains; kept, not copied.

    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.index = None if bool(mask.all()) else narrow(mask.nonzero().squeeze(1), len(mask))
        self.total = len(mask)
        self.size = len(mask) if self.index is None else len(self.index)

    def of(self, rows: Tensor) -> Tensor:
        """Gather what trains of rows (*, P): (*, n), or the rows themselves if everything trains."""
        return rows if self.index is None else rows.index_select(-1, self.index)

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor) -> None:
        """Put values (*, n) where they train in rows (*, P); nothing else is touched."""
        rows.copy_(values) if self.index is None else rows.index_copy_(-1, self.index.long(), values)

    def spread(self, values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """Lay values (*, n) out over all coordinates, (*, P), with one value where nothing trains."""
        if self.index is None:
            return values
        whole = torch.full((*values.shape[:-1], self.total), elsewhere, dtype=values.dtype, device=values.device)
        return whole.index_copy_(-1, self.index.to(values.device).long(), values)


@dataclass(frozen=True)
class Carry:
    """From the coordinates that trained to those that train now, for what is kept of each.

    What is kept of a coordinate that stops is dropped; one that starts begins anew.

    Attributes:
        before: what trained.
        after: what trains now.
        round: the round before which that changes.
        zeros: whether what stops becomes zero.

    >>> marks = torch.tensor([[True, True, False], [False, True, True]])
    >>> Carry(Subspace(marks[0]), Subspace(marks[1]))(torch.tensor([1.0, 2.0]))
    tensor([2., 0.])
    """

    before: Subspace
    after: Subspace
    round: int = 0
    zeros: bool = False

    def __call__(self, values: Tensor, new: float = 0.0) -> Tensor:
        """Carry values (*, n) over: (*, n) of now, ``new`` where a coordinate starts."""
        whole = self.before.spread(values, new)
        index = self.after.index
        return whole.clone() if index is None else whole.index_select(-1, index.to(whole.device))

    def within(self, marks: Tensor) -> Carry:
        """Leave out all but some of the P coordinates: bool (P,)."""
        pair = [Subspace(part.mask & marks.to(part.mask.device)) for part in (self.before, self.after)]
        return replace(self, before=pair[0], after=pair[1])


def narrow(index: Tensor, total: int) -> Tensor:
    """Store positions below ``total`` in four bytes each where that is enough."""
    return index.to(torch.int32 if total < 1 << 31 else torch.int64)
