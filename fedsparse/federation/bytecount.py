"""Byte counts of each round's messages. Shapes: P coordinates, n of them train, G global rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fedsparse.core.space import Patterns, parameters_of
from fedsparse.core.subspace import Carry, Subspace
from fedsparse.federation.exchange.downlink import Downlink
from fedsparse.federation.exchange.ledger import Ledger, Traffic
from fedsparse.federation.exchange.wire.message import (
    HEADER,
    Size,
    bitmap_size,
    encode,
    encode_mask,
    encode_tensors,
    known_size,
)
from fedsparse.federation.exchange.wire.model import write_model
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change
from fedsparse.federation.server.merging import Merging
from fedsparse.federation.watcher import Watcher

if TYPE_CHECKING:
    from fedsparse.federation.federation import Federation
    from fedsparse.federation.round import Round

NOTHING = Size(0, 0, 0)


@dataclass(frozen=True)
class PreparedHead:
    """A head that was prepared before the first round, and that clients get once more then, as no round brings it all.

    Attributes:
        names: patterns of its parameters.
        counted: whether the preparation has counted this message.

    """

    names: Patterns
    counted: bool

    def message(self, net: nn.Module) -> bytes:
        """Write the head of a network."""
        return encode_tensors(parameters_of(net, self.names))


class Down(NamedTuple):
    """The messages to a client in a round; empty where it has what they bring.

    Attributes:
        model: all floating-point tensors of the model, at first contact; without zeros that the mask implies.
        head: the prepared head, for a client that has the model of before.
        mask: one bit a coordinate.
        row: what changed since, and values that every round sends.

    """

    model: bytes
    head: bytes
    mask: bytes
    row: bytes


class ByteCount(Watcher):
    """Counts the bytes that each client sends and receives: at first contact the model, later what changed since.

    Args:
        ledger: sums over rounds.
        traffic: table of clients and rounds.
        subspace: the coordinates that train.
        local: bool (P,), coordinates that stay with the clients.
        groups: G.
        model_length: bytes of the first model.
        prunes: whether frozen coordinates are zero, so that the mask implies their values.
        merging: what is merged into frozen weights travels down as factors; None: these stay.
        head: a prepared head that rounds do not bring; None without one.

    Attributes:
        travelling: index of the trained coordinates that travel, bool (n,); a slice of all if all do.
        downlinks: of each group, what its clients hold.
        before: of each group, the travelling values before the server's step; empty while clients train.

    """

    def __init__(
        self,
        ledger: Ledger,
        traffic: Traffic,
        subspace: Subspace,
        local: Tensor,
        groups: int = 1,
        model_length: int = 0,
        prunes: bool = False,
        merging: Merging | None = None,
        head: PreparedHead | None = None,
    ) -> None:
        self.ledger, self.traffic, self.local, self.merging = ledger, traffic, local, merging
        self.head = head
        self.model_length, self.mask_length, self.prunes = model_length, mask_length(subspace), prunes
        self.downlinks = [Downlink() for _ in range(groups)]
        self.travelling = self._travelling(subspace)
        self.before: list[Tensor] = []

    def _travelling(self, subspace: Subspace) -> Tensor | slice:
        """Mark the trained coordinates that travel, bool (n,); all of them by a slice, which copies nothing."""
        travels = ~subspace.of(self.local.to(subspace.mask.device))
        return slice(None) if bool(travels.all()) else travels

    def move(self, carry: Carry) -> None:
        """Take over another mask, and send it to every client again."""
        self.travelling = self._travelling(carry.after)
        for downlink in self.downlinks:
            downlink.move(carry.within(~self.local))
        self.ledger.has_mask.clear()
        self.mask_length = mask_length(carry.after)

    def step(self, round: Round) -> None:
        """Copy the travelling values of each global row, to find what the round changes."""
        self.before = [row[self.travelling].clone() for row in round.federation.server.values]

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Count the round's bytes, record which coordinates it changed and which model each client holds, add rows."""
        for report in reports:
            for client, group, up in zip(report.clients, report.group, report.up, strict=True):
                self._count(round, client, group, up)
            self.ledger.stepped(report.local_steps, report.clipped)
        pairs = [pair for report in reports for pair in zip(report.clients, report.group, strict=True)]
        for group, downlink in enumerate(self.downlinks):
            after = round.federation.server.values[group][self.travelling]
            if self.merging is not None:
                drawn = round.federation.server.subspace.of(self.merging.drawn.to(after.device))[self.travelling]
                after = torch.where(drawn, self.before[group], after)
            members, others = ([c for c, g in pairs if (g == group) is own] for own in (True, False))
            downlink.close(round.number, self.before[group], after, members, others)
        self.before = []
        self.traffic.write(round.number + 1, self.ledger.close())

    def _count(self, round: Round, client: int, group: int, up: Size) -> None:
        """Count the bytes of one client, which sent ``up``."""
        federation, ledger, row = round.federation, self.ledger, self.before[group]
        first, setup, trained = client not in ledger.has_model, ledger.bytes_setup_down, federation.server.subspace
        zeros = self.prunes * (trained.total - trained.size) * row.element_size()
        if not first and self.head is not None and not self.head.counted:
            ledger.setup(1, up=0, down=len(self._head(federation, client)))
        ledger.first_model([client], self.model_length - zeros)
        ledger.mask([client], self.mask_length)
        setup = ledger.bytes_setup_down - setup
        more = trained.size * federation.objective.messages * (not round.phase.explores)  # SCAFFOLD's c
        if self.merging is not None and not first:
            more += self.merging.between(self.downlinks[group].holds.get(client, 0), round.number)
        if first:
            down = known_size(0, more, row.dtype) if more else NOTHING
        else:
            down = self.downlinks[group].size(client, row, federation.buffers.size + more)
        buffers = federation.buffers.size * federation.buffers.values.element_size()
        dense = HEADER.size + federation.server.rows[0].nbytes + buffers
        ledger.trained(client, up, down, dense, setup, prepares=round.phase.explores)

    def messages(self, federation: Federation, client: int, group: int, everything: bool = False) -> Down:
        """Write the messages to a client before it trains, of the bytes that are counted when the round closes.

        Args:
            federation: between two rounds, or in an open one.
            client: its id.
            group: its global row.
            everything: whether the client has lost what it held.

        """
        row = federation.server.values[group][self.travelling]
        if everything or client not in self.ledger.has_model:
            sent = federation.objective.broadcast(federation.server.values[group])
            mask = self._mask(federation, client, everything)
            return Down(self._model(federation, group), b"", mask, encode(row[:0], buffers=sent) if len(sent) else b"")
        changed = self.downlinks[group].message(client, row, self._extra(federation, group))
        return Down(b"", self._head(federation, client), self._mask(federation, client), changed)

    def whole(self, federation: Federation, client: int, group: int) -> Down:
        """Write the whole row to a client that has the model, whatever else it holds."""
        row = encode(federation.server.values[group][self.travelling], buffers=self._extra(federation, group))
        return Down(b"", self._head(federation, client), self._mask(federation, client), row)

    def _extra(self, federation: Federation, group: int) -> Tensor:
        """Gather what every round sends beside the row: buffers, and what the drift correction sends."""
        sent = federation.objective.broadcast(federation.server.values[group])
        return torch.cat([federation.buffers.values[group][: federation.buffers.size], sent])

    def _mask(self, federation: Federation, client: int, lost: bool = False) -> bytes:
        """Write the mask for a client that does not hold it; nothing if everything trains."""
        due = self.mask_length and (lost or client not in self.ledger.has_mask)
        return encode_mask(federation.server.subspace.mask) if due else b""

    def _head(self, federation: Federation, client: int) -> bytes:
        """Write the prepared head for a client that has not trained before; nothing where rounds bring it."""
        if self.head is None or any(client in downlink.holds for downlink in self.downlinks):
            return b""
        federation.show(0)
        return self.head.message(federation.clients.net)

    def _model(self, federation: Federation, group: int) -> bytes:
        """Write the model of a group; the mask has to be read before it where zeros are left out."""
        federation.show(group)
        written = write_model(federation.clients.net, federation.clients.space, self._implied(federation))
        federation.show(0)
        return written

    def _implied(self, federation: Federation) -> Tensor | None:
        """Mark the coordinates that a message of the model has, bool (P,); None for all."""
        return federation.server.subspace.mask if self.prunes else None

    def state_dict(self) -> dict[str, Any]:
        """Sums, and the model that each client holds."""
        return {"ledger": self.ledger.state_dict(), "downlink": [downlink.state_dict() for downlink in self.downlinks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load sums and clients' models of a checkpoint."""
        self.ledger.load_state_dict(state["ledger"])
        for downlink, stored in zip(self.downlinks, state["downlink"], strict=True):
            downlink.load_state_dict(stored)


def mask_length(subspace: Subspace) -> int:
    """Bytes of the message with a mask, one bit a coordinate; 0 if everything trains."""
    return 0 if subspace.index is None else bitmap_size(subspace.total).total
