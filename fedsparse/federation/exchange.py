"""What of an update is sent. K clients of the cohort, P coordinates, Q buffer values, n values sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.federation.wire import Payload

FROM_SERVER = -1  # in place of a client's id: what the server sends to one client


@dataclass(frozen=True)
class Update:
    """What K clients changed in a round.

    Attributes:
        clients: K ids.
        rows: (K, P) change of each coordinate.
        buffers: (K, Q) change of the float buffers.
        weight: K weights in the average.
        loss: K mean training losses.
        sent: bool (K, P), which coordinates each client sent, where that differs between them; None: all alike.

    """

    clients: tuple[int, ...]
    rows: Tensor
    buffers: Tensor
    weight: tuple[float, ...]
    loss: tuple[float, ...]
    sent: Tensor | None = None


class Exchange(Protocol):
    """Turns updates into payloads and back; knows nothing of the simulator.

    Attributes:
        own: whether clients send different coordinates, so that each is averaged over those who sent it.

    """

    own: bool

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

    own = False

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


class OwnMasked(Masked):
    """Each client sends the coordinates of its own mask, and receives those that anybody trains.

    Both sides hold every mask, so no positions travel. Clients of one cohort need masks of one size.

    Args:
        trained: bool (P,), which coordinates some client trains.
        local: bool (P,), which coordinates stay with the client.
        masks: gives the masks of K clients, bool (K, P).

    """

    own = True

    def __init__(self, trained: Tensor, local: Tensor, masks: Callable[[Sequence[int]], Tensor]) -> None:
        super().__init__(trained, local)
        self.masks, self.stays = masks, local

    def encode(self, update: Update) -> Payload:
        """Gather each client's own coordinates: rows (K, P) -> values (K, n).

        Raises:
            ValueError: the masks of a cohort differ in size.

        """
        if update.clients[0] == FROM_SERVER:
            return super().encode(update)
        sent = self._sent_by(update.clients)
        sizes = sent.sum(1)
        if int(sizes.min()) != int(sizes.max()):
            raise ValueError("the clients' own masks differ in size; mask.owner=client then needs federation.cohort=1")
        values = update.rows[sent].view(len(update.clients), -1)
        return Payload(update.clients, values, update.buffers, update.weight, update.loss)

    def decode(self, payload: Payload) -> Update:
        """Scatter values (K, n) into rows (K, P) of zeros, and say which coordinates they are."""
        sent = self._sent_by(payload.clients)
        rows = payload.values.new_zeros(sent.shape)
        rows[sent] = payload.values.flatten()
        return Update(payload.clients, rows, payload.buffers, payload.weight, payload.loss, sent)

    def _sent_by(self, clients: Sequence[int]) -> Tensor:
        masks = self.masks(clients)
        return masks & ~self.stays.to(masks.device)


def _positions(sent: Tensor) -> Tensor | None:
    """Positions of the sent coordinates, or None for all of them."""
    return None if bool(sent.all()) else sent.nonzero().squeeze(1)
