"""What of an update is sent.

Shapes: K clients of the cohort, P coordinates of which n train, Q buffer values, m values sent. An update holds trained
coordinates only: nothing else can change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsparse.federation.wire import Payload

OwnMasks = Callable[[Sequence[int]], Tensor | None]
FROM_SERVER = -1  # in place of a client's id: what the server sends to one client


@dataclass(frozen=True)
class Update:
    """What K clients changed in a round.

    Attributes:
        clients: K ids.
        rows: (K, n) change of each coordinate that trains.
        buffers: (K, Q) change of the float buffers.
        weight: K weights in the average.
        loss: K mean training losses.
        sent: bool (K, n), which coordinates each client sent, where that differs between them; None: all alike.

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
        trained: bool (P,), which coordinates train, of some client at least; both sides know it.
        local: bool (P,), which coordinates stay with the client.
        masks: gives the own masks of K clients, bool (K, P); None if all train the same coordinates.

    Raises:
        ValueError: own masks, with an exchange that sends more than a client's mask.

    """

    own = False

    def __init__(self, trained: Tensor, local: Tensor, masks: OwnMasks | None = None) -> None:
        if masks is not None:
            raise ValueError("mask.owner=client needs exchange=masked: each client sends what its own mask trains")
        stays = local.to(trained.device)
        self.size = int(trained.sum())
        self.index = _positions(~stays[trained])
        self.still = self._still(trained, stays)

    def _still(self, trained: Tensor, local: Tensor) -> int:
        """Count the coordinates that are sent although they cannot have changed: zeros, behind the others."""
        return int((~trained & ~local).sum())

    def encode(self, update: Update) -> Payload:
        """Gather what is sent: rows (K, n) -> values (K, m)."""
        values = update.rows if self.index is None else update.rows[:, self._index(update.rows.device)]
        values = F.pad(values, (0, self.still)) if self.still else values
        return Payload(update.clients, values, update.buffers, update.weight, update.loss)

    def decode(self, payload: Payload) -> Update:
        """Scatter values (K, m) into rows (K, n) of zeros."""
        rows = payload.values[:, : payload.values.shape[1] - self.still]
        if self.index is not None:
            index, values = self._index(rows.device), rows
            rows = rows.new_zeros(len(payload.clients), self.size).index_copy_(1, index, values)
        return Update(payload.clients, rows, payload.buffers, payload.weight, payload.loss)

    def _index(self, device: torch.device) -> Tensor:
        assert self.index is not None
        if self.index.device != device:
            self.index = self.index.to(device)
        return self.index


class Masked(Full):
    """Only trained coordinates are sent; both sides know the masks, so no positions travel.

    Where each client has a mask of its own, it sends the coordinates of that, and receives those that anybody trains.
    Clients of one cohort then need masks of one size.
    """

    def __init__(self, trained: Tensor, local: Tensor, masks: OwnMasks | None = None) -> None:
        super().__init__(trained, local)
        self.masks, self.own = masks, masks is not None
        self.trained, self.travels = trained, ~local.to(trained.device)[trained]

    def encode(self, update: Update) -> Payload:
        """Gather the coordinates of the mask, or each client's own: rows (K, n) -> values (K, m).

        Raises:
            ValueError: own masks of a cohort differ in size.

        """
        if self.masks is None or update.clients[0] == FROM_SERVER:
            return super().encode(update)
        sent = self._sent_by(self.masks, update.clients)
        sizes = sent.sum(1)
        if int(sizes.min()) != int(sizes.max()):
            raise ValueError("the clients' own masks differ in size; mask.owner=client then needs federation.cohort=1")
        values = update.rows[sent].view(len(update.clients), -1)
        return Payload(update.clients, values, update.buffers, update.weight, update.loss)

    def decode(self, payload: Payload) -> Update:
        """Scatter values (K, m) into rows (K, n) of zeros; with own masks say which coordinates they are."""
        if self.masks is None:
            return super().decode(payload)
        sent = self._sent_by(self.masks, payload.clients)
        rows = payload.values.new_zeros(sent.shape)
        rows[sent] = payload.values.flatten()
        return Update(payload.clients, rows, payload.buffers, payload.weight, payload.loss, sent)

    def _still(self, trained: Tensor, local: Tensor) -> int:
        return 0

    def _sent_by(self, masks: OwnMasks, clients: Sequence[int]) -> Tensor:
        held = masks(clients)
        assert held is not None  # there are own masks: they are why this exchange was given them
        return held[:, self.trained.to(held.device)] & self.travels.to(held.device)


def _positions(sent: Tensor) -> Tensor | None:
    """Positions of the sent coordinates, or None for all of them."""
    return None if bool(sent.all()) else sent.nonzero().squeeze(1)
