"""What the server sends a client: what moved since it last took part, or the whole row, whichever is smaller.

Shapes: P coordinates, n of them travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.subspace import Carry
from fedsparse.federation.exchange.wire.message import HEADER, Size, known_size
from fedsparse.federation.exchange.wire.positions import write_positions

_NEVER = -1


class Downlink:
    """Knows when each coordinate last moved, and what each client holds.

    Attributes:
        moved: the round in which a coordinate last moved, int32 (n,); or one number where all moved in the same.
        holds: by client, the round whose starting values it holds.
        stopped: the round in which each coordinate that travels no longer last moved, int32 (P,), -1 for all others;
            None while the mask has not changed.
        zeros: whether these are zero, so that the mask tells their values.

    """

    def __init__(self) -> None:
        self.moved: Tensor | int = _NEVER
        self.stopped: Tensor | None = None
        self.zeros = False
        self.holds: dict[int, int] = {}
        self.sizes: dict[int, Size] = {}

    def size(self, client: int, row: Tensor, buffers: int) -> Size:
        """Bytes of the message to a client that holds an older model: row (n,), so many buffer values."""
        since = self.holds.get(client, _NEVER)
        if since not in self.sizes:
            self.sizes[since] = self._size(since, row, buffers)
        return self.sizes[since]

    def _size(self, since: int, row: Tensor, buffers: int) -> Size:
        size = self._trained(since, row, buffers)
        if self.stopped is None or self.zeros or not bool((late := self.stopped >= max(since, 0)).any()):
            return size
        return size + replace(self._some(late, 0, row), header=0)

    def _trained(self, since: int, row: Tensor, buffers: int) -> Size:
        """Bytes of what trains now."""
        whole = known_size(len(row), buffers, row.dtype)
        if since == _NEVER or (isinstance(self.moved, int) and self.moved >= since):
            return whole
        last = torch.full((len(row),), self.moved) if isinstance(self.moved, int) else self.moved
        return min(whole, self._some(last >= since, buffers, row), key=lambda size: size.total)

    def _some(self, marks: Tensor, buffers: int, row: Tensor) -> Size:
        """Bytes of a message with these coordinates, bool (n,)."""
        values = (int(marks.count_nonzero()) + buffers) * row.dtype.itemsize
        return Size(HEADER.size, len(write_positions(marks.cpu().numpy())[1]), values)

    def close(self, round: int, start: Tensor, after: Tensor, clients: Iterable[int] = ()) -> None:
        """Note which coordinates a round moved, from their values (n,) before and after, and who holds those before."""
        self.sizes = {}
        self.holds.update(dict.fromkeys(clients, round))
        moved = start != after
        if bool(moved.all()):
            self.moved = round
        elif bool(moved.any()):
            last = torch.full(moved.shape, self.moved) if isinstance(self.moved, int) else self.moved
            self.moved = torch.where(moved, round, last.to(moved.device)).int()

    def move(self, carry: Carry) -> None:
        """Let other coordinates train, or become zero, before a round.

        What has moved for the last time, or has become zero, still has to reach who holds an older model.
        """
        self.sizes, self.zeros = {}, carry.zeros
        if isinstance(self.moved, int):
            self.moved = torch.full((carry.before.size,), self.moved, dtype=torch.int32)
        last = carry.before.spread(self.moved, _NEVER).cpu().clone()
        last = last if self.stopped is None else torch.maximum(last, self.stopped)
        goes_on = carry.after.mask.cpu()
        if carry.zeros:
            last[carry.before.mask.cpu() & ~goes_on] = carry.round - 1
        self.moved = last[goes_on]
        self.stopped = last.masked_fill(goes_on, _NEVER)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and two tensors."""
        return {"moved": self.moved, "holds": dict(self.holds), "stopped": self.stopped, "zeros": self.zeros}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.moved, self.holds = state["moved"], dict(state["holds"])
        self.stopped, self.zeros = state.get("stopped"), state.get("zeros", False)
