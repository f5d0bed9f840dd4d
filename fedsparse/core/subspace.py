"""What trains of the coordinates of a row, and how what is kept of each follows when that changes.

Shapes: P coordinates of the space, n of them train; * any dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 17  # coordinates at once on a CPU: they stay in its cache, and values and a long index need no second row


class Coordinates:
    """The n of P coordinates that train, of rows that hold all P.

    Args:
        mask: bool (P,), True where a coordinate trains.

    """

    def __init__(self, mask: Tensor) -> None:
        whole = bool(mask.all())
        self.index = None if whole else narrow(mask.nonzero().squeeze(1), len(mask))
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
class Move:
    """From the coordinates that trained to those that train now, for what is kept of each.

    What is kept of a coordinate that stops is dropped; one that starts begins anew.

    >>> marks = torch.tensor([[True, True, False], [False, True, True]])
    >>> Move(Coordinates(marks[0]), Coordinates(marks[1]))(torch.tensor([1.0, 2.0]))
    tensor([2., 0.])
    """

    before: Coordinates
    after: Coordinates

    def __call__(self, values: Tensor, new: float = 0.0) -> Tensor:
        """Carry values (*, n) over: (*, n) of now, ``new`` where a coordinate starts."""
        whole = self.before.spread(values, new)
        index = self.after.index
        return whole.clone() if index is None else whole.index_select(-1, index.to(whole.device))


def narrow(index: Tensor, total: int) -> Tensor:
    """Store positions below ``total`` in four bytes each where that is enough."""
    return index.to(torch.int32 if total < 1 << 31 else torch.int64)
