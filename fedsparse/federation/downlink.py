"""What the server sends a client: what moved since it last took part, or the whole row, whichever is smaller.

Shapes: n coordinates that travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsparse.federation.positions import write_positions
from fedsparse.federation.wire import HEADER, Size, known_size
from fedsparse.places import Move

_NEVER = -1


class Downlink:
    """Knows when each coordinate last moved, and what each client holds.

    Attributes:
        moved: the round in which a coordinate last moved, int32 (n,); or one number where all moved in the same.
        holds: by client, the round whose starting values it holds.

    """

    def __init__(self) -> None:
        self.moved: Tensor | int = _NEVER
        self.holds: dict[int, int] = {}
        self.known: dict[int, Size] = {}

    def size(self, client: int, row: Tensor, buffers: int) -> Size:
        """Bytes of the message to a client that holds an older model: row (n,), so many buffer values."""
        since = self.holds.get(client, _NEVER)
        if since not in self.known:
            self.known[since] = self._size(since, row, buffers)
        return self.known[since]

    def _size(self, since: int, row: Tensor, buffers: int) -> Size:
        whole = known_size(len(row), buffers, row.dtype)
        if since == _NEVER or (isinstance(self.moved, int) and self.moved >= since):
            return whole
        last = torch.full((len(row),), self.moved) if isinstance(self.moved, int) else self.moved
        return min(whole, self._some(last >= since, buffers, row), key=lambda size: size.total)

    def _some(self, marks: Tensor, buffers: int, row: Tensor) -> Size:
        """Bytes of a message with these coordinates, bool (n,)."""
        values = (int(marks.count_nonzero()) + buffers) * row.dtype.itemsize
        return Size(HEADER.size, len(write_positions(marks.cpu().numpy())[1]), values)

    def told(self, client: int, round: int) -> None:
        """Note that a client now holds the values that a round starts from."""
        self.holds[client] = round

    def close(self, round: int, before: Tensor, after: Tensor) -> None:
        """Note which coordinates a round moved, from their values (n,) before and after."""
        self.known = {}
        moved = before != after
        if bool(moved.all()):
            self.moved = round
        elif bool(moved.any()):
            last = torch.full(moved.shape, self.moved) if isinstance(self.moved, int) else self.moved
            self.moved = torch.where(moved, round, last.to(moved.device)).int()

    def follow(self, move: Move, round: int) -> None:
        """Let other coordinates train after a round: clients are sent those that start, whatever they hold of them."""
        self.known = {}
        if isinstance(self.moved, int):
            self.moved = torch.full((move.before.size,), self.moved, dtype=torch.int32)
        self.moved = move(self.moved, new=round)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and one tensor."""
        return {"moved": self.moved, "holds": dict(self.holds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.moved, self.holds = state["moved"], dict(state["holds"])
