"""Downlink sizes: a client receives the coordinates that changed since it last took part, or the row, if smaller.

Shapes: P coordinates, n of them travel, m of which rest in a round that changes almost all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.subspace import Carry, narrow, where_true
from fedsparse.federation.exchange.wire.message import Size, counted_size, encode, known_size
from fedsparse.federation.exchange.wire.positions import positions_size

_NEVER = -1
_RARE = 1 / 8  # part of the coordinates: the list of so many that rest takes a quarter of a row


class Downlink:
    """Records the round in which each coordinate last changed, and the model that each client holds.

    Attributes:
        moved: int32 (n,), the round in which a coordinate last changed; or one number, of all but those that rest.
        resting: (m,), ascending positions of coordinates that changed in an earlier round than this number; few.
        rested: int32 (m,), that round of each.
        holds: by client, the round whose starting values it holds.
        stopped: int32 (P,), the round in which a coordinate that no longer travels last changed, -1 for all others;
            None until the mask changes.
        zeros: whether these are zero, so that the mask implies their values.
        sizes: of messages in the open round, by the round of the model that a client holds.

    """

    def __init__(self) -> None:
        self.moved: Tensor | int = _NEVER
        self.resting = self.rested = torch.zeros(0, dtype=torch.int32)
        self.stopped: Tensor | None = None
        self.zeros = False
        self.holds: dict[int, int] = {}
        self.sizes: dict[int, Size] = {}

    def size(self, client: int, row: Tensor, buffers: int) -> Size:
        """Bytes of the message that brings a client's model up to date: row (n,), and so many buffer values."""
        since = self.holds.get(client, _NEVER)
        if since not in self.sizes:
            size = self._trained(since, row, buffers)
            if self.stopped is not None and not self.zeros and bool((late := self.stopped >= max(since, 0)).any()):
                size += replace(self._some(late, 0, row), header=0)
            self.sizes[since] = size
        return self.sizes[since]

    def message(self, client: int, row: Tensor, extra: Tensor) -> bytes:
        """Write the message of ``size`` bytes, of which a mask that changed has none: row (n,), buffer values (Q,)."""
        since = self.holds.get(client, _NEVER)
        whole = self._trained(since, row, len(extra)) == known_size(len(row), len(extra), row.dtype)
        return encode(row, None if whole else self._late(since, row), buffers=extra)

    def _trained(self, since: int, row: Tensor, buffers: int) -> Size:
        """Bytes of a message with the coordinates that train now."""
        whole = known_size(len(row), buffers, row.dtype)
        if since == _NEVER or (isinstance(self.moved, int) and self.moved >= since and not len(self.resting)):
            return whole
        return min(whole, self._some(self._late(since, row), buffers, row), key=lambda size: size.total)

    def _late(self, since: int, row: Tensor) -> Tensor:
        """Mark the coordinates of a row (n,) that changed in this round or later: bool (n,)."""
        if isinstance(self.moved, Tensor):
            return self.moved >= since
        late = torch.full(row.shape, self.moved >= since, device=row.device)
        late[self.resting.to(row.device).long()] = (self.rested >= since).to(row.device)
        return late

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
        still = start == after
        count, nothing = int(still.count_nonzero()), torch.zeros(0, dtype=torch.int32)
        if not count:
            self.moved, self.resting, self.rested = round, nothing, nothing
        elif count <= _RARE * len(still):
            places = narrow(where_true(still, count), len(still))
            self.moved, self.resting, self.rested = round, places, self._last(places)
        elif count < len(still):
            self.moved = self._each(len(still), still.device).masked_fill_(~still, round)
            self.resting = self.rested = nothing

    def _last(self, places: Tensor) -> Tensor:
        """Look up the round in which these coordinates last changed: int32, as many."""
        if isinstance(self.moved, Tensor):
            return self.moved.to(places.device)[places.long()]
        last = torch.full(places.shape, self.moved, dtype=torch.int32, device=places.device)
        if not len(self.resting):
            return last
        resting, rested = self.resting.to(places.device), self.rested.to(places.device)
        at = torch.searchsorted(resting, places).clamp_(max=len(resting) - 1)
        return torch.where(resting[at] == places, rested[at], last)

    def _each(self, size: int, device: torch.device) -> Tensor:
        """List the round in which each of n coordinates last changed: int32 (n,)."""
        if isinstance(self.moved, Tensor):
            return self.moved.to(device)
        last = torch.full((size,), self.moved, dtype=torch.int32, device=device)
        return last.index_copy_(0, self.resting.to(device).long(), self.rested.to(device))

    def move(self, carry: Carry) -> None:
        """Carry the record over to another mask, before a round.

        The last change of a coordinate that stops, or becomes zero, has yet to be sent to clients with older models.
        """
        self.sizes, self.zeros = {}, carry.zeros
        last = carry.before.spread(self._each(carry.before.size, torch.device("cpu")), _NEVER).clone()
        last = last if self.stopped is None else torch.maximum(last, self.stopped)
        goes_on = carry.after.mask.cpu()
        if carry.zeros:
            last[carry.before.mask.cpu() & ~goes_on] = carry.round - 1
        self.moved, self.resting, self.rested = last[goes_on], self.resting[:0], self.rested[:0]
        self.stopped = last.masked_fill(goes_on, _NEVER)

    def state_dict(self) -> dict[str, Any]:
        """The record: plain values and tensors."""
        rest = {"resting": self.resting, "rested": self.rested}
        return {"moved": self.moved, "holds": dict(self.holds), "stopped": self.stopped, "zeros": self.zeros, **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the record from a checkpoint; earlier ones have no coordinates that rest."""
        self.moved, self.holds, nothing = state["moved"], dict(state["holds"]), torch.zeros(0, dtype=torch.int32)
        self.resting, self.rested = state.get("resting", nothing), state.get("rested", nothing)
        self.stopped, self.zeros = state.get("stopped"), state.get("zeros", False)
