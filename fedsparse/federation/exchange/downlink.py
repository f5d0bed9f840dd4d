"""Downlink sizes: a client receives the coordinates that changed since it last took part, or the row, if smaller.

Shapes: P coordinates, n of them travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.subspace import Carry
from fedsparse.federation.exchange.wire.message import Size, counted_size, known_size
from fedsparse.federation.exchange.wire.positions import positions_size

_NEVER = -1


class Downlink:
    """Records the round in which each coordinate last changed, and the model that each client holds.

    Attributes:
        moved: int32 (n,), the round in which a coordinate last changed; or one number if all changed in the same.
        holds: by client, the round whose starting values it holds.
        stopped: int32 (P,), the round in which a coordinate that no longer travels last changed, -1 for all others;
            None until the mask changes.
        zeros: whether these are zero, so that the mask implies their values.
        sizes: of messages in the open round, by the round of the model that a client holds.

    """

    def __init__(self) -> None:
        self.moved: Tensor | int = _NEVER
        self.stopped: Tensor | None = None
        self.zeros = False
        self.holds: dict[int, int] = {}
        self.sizes: dict[int, Size] = {}

    def size(self, client: int, row: Tensor, buffers: int) -> Size:
        """Bytes of the message that brings a client's model up to date: row (n,), and so many buffer values."""
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
        """Bytes of a message with the coordinates that train now."""
        whole = known_size(len(row), buffers, row.dtype)
        if since == _NEVER or (isinstance(self.moved, int) and self.moved >= since):
            return whole
        last = torch.full((len(row),), self.moved) if isinstance(self.moved, int) else self.moved
        return min(whole, self._some(last >= since, buffers, row), key=lambda size: size.total)

    def _some(self, marks: Tensor, buffers: int, row: Tensor) -> Size:
        """Bytes of a message with these coordinates, bool (n,); counted where they are, with one wait for both."""
        count, positions = torch.stack([marks.count_nonzero(), positions_size(marks)]).tolist()
        return counted_size(count, positions, buffers, row.dtype, row.dtype)

    def close(
        self, round: int, start: Tensor, after: Tensor, clients: Iterable[int] = (), others: Iterable[int] = ()
    ) -> None:
        """Record which coordinates a round changed, and its clients.

        Args:
            round: the round, from 0.
            start: values (n,) that the clients started from, and hold.
            after: values (n,) after the server's step.
            clients: that took part.
            others: that took part with another global row, and no longer hold this one.

        """
        self.sizes = {}
        for client in others:
            self.holds.pop(client, None)
        self.holds.update(dict.fromkeys(clients, round))
        moved = start != after
        if bool(moved.all()):
            self.moved = round
        elif bool(moved.any()):
            last = torch.full(moved.shape, self.moved) if isinstance(self.moved, int) else self.moved
            self.moved = torch.where(moved, round, last.to(moved.device)).int()

    def move(self, carry: Carry) -> None:
        """Carry the record over to another mask, before a round.

        The last change of a coordinate that stops, or becomes zero, has yet to be sent to clients with older models.
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
        """The record: plain values and two tensors."""
        return {"moved": self.moved, "holds": dict(self.holds), "stopped": self.stopped, "zeros": self.zeros}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the record from a checkpoint."""
        self.moved, self.holds = state["moved"], dict(state["holds"])
        self.stopped, self.zeros = state.get("stopped"), state.get("zeros", False)
