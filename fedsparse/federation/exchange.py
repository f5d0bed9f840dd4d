"""What of an update is sent. K clients of the cohort, P coordinates, Q buffer values, n values sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.federation.wire import Payload


@dataclass(frozen=True)
class Update:
    """What K clients changed in a round.

    Attributes:
        clients: K ids.
        rows: (K, P) change of each coordinate.
        buffers: (K, Q) change of the float buffers.
        weight: K weights in the average.
        loss: K mean training losses.

    """

    clients: tuple[int, ...]
    rows: Tensor
    buffers: Tensor
    weight: tuple[float, ...]
    loss: tuple[float, ...]


class Exchange(Protocol):
    """Turns updates into payloads and back; knows nothing of the simulator."""

    def encode(self, update: Update) -> Payload:
        """Write what is sent of K updates."""

    def decode(self, payload: Payload) -> Update:
        """Read it back; what was not sent is zero."""


class Full:
    """Every coordinate that does not stay with the client is sent.

    Args:
        trained: bool (P,), which coordinates train; both sides know it.
        local: bool (P,), which coordinates stay with the client.

    """

    def __init__(self, trained: Tensor, local: Tensor) -> None:
        self.size = trained.numel()
        self.index = _positions(self._sent(trained, local))

    def _sent(self, trained: Tensor, local: Tensor) -> Tensor:
        return ~local

    def encode(self, update: Update) -> Payload:
        """Gather the sent coordinates: rows (K, P) -> values (K, n)."""
        values = update.rows if self.index is None else update.rows[:, self._index(update.rows.device)]
        return Payload(update.clients, values, update.buffers, update.weight, update.loss)

    def decode(self, payload: Payload) -> Update:
        """Scatter values (K, n) into rows (K, P) of zeros."""
        rows = payload.values
        if self.index is not None:
            index = self._index(rows.device)
            rows = rows.new_zeros(len(payload.clients), self.size).index_copy_(1, index, payload.values)
        return Update(payload.clients, rows, payload.buffers, payload.weight, payload.loss)

    def _index(self, device: torch.device) -> Tensor:
        assert self.index is not None
        if self.index.device != device:
            self.index = self.index.to(device)
        return self.index


class Masked(Full):
    """Only trained coordinates are sent; both sides know the mask, so no positions travel."""

    def _sent(self, trained: Tensor, local: Tensor) -> Tensor:
        return trained & ~local


def _positions(sent: Tensor) -> Tensor | None:
    """Positions of the sent coordinates, or None for all of them."""
    return None if bool(sent.all()) else sent.nonzero().squeeze(1)
