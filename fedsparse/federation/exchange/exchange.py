"""The exchange: encodes the coordinates of an update that are sent, and decodes them.

Shapes: K clients of the cohort, P coordinates of which n train, Q buffer values. An update has trained coordinates
only: no others can change. This module is independent of the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Carry, Subspace, where_true
from fedsparse.federation.exchange.sparsifiers import Layout, Sender, Sparsifier
from fedsparse.federation.exchange.update import Payload, Update, admit, finite, refuse, row_sums
from fedsparse.federation.exchange.wire.message import (
    Message,
    check_sendable,
    counted_size,
    encode,
    known_size,
    read,
)
from fedsparse.federation.exchange.wire.positions import positions_size
from fedsparse.federation.exchange.wire.values import UNFIT, as_read
from fedsparse.federation.stores.store import ClientStore

OwnMasks = Callable[[Sequence[int]], Tensor | None]
PAYLOADS = ("change", "value")


Send = Callable[[Update], Payload]


class Filter:
    """Changes an update before it is sent. Filters are nested: the first of a list calls the next as its ``send``.

    No message is written of what they make of it. A filter that needs real ones, as what they bring cannot be computed
    otherwise, puts them into the payload: ``replace(payload, written=tuple(exchange.messages(payload)))`` is read.

    Attributes:
        carries: whether the unsent part of an update is carried over to the next round.
        stores: of the clients' rows that the filter needs, by name.

    """

    carries = False

    def __init__(self) -> None:
        self.stores: dict[str, ClientStore] = {}

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Replace the stores by those that ``make`` builds by name."""
        self.stores = {name: make(name) for name in self.stores}

    def __call__(self, update: Update, send: Send, exchange: Exchange) -> Payload:
        """Pass an update on to ``send``; ``exchange.decode`` gives the update as the receiver decodes it."""
        return send(update)


@dataclass(frozen=True)
class Sendable:
    """The trained coordinates that may travel.

    Attributes:
        subspace: of the n coordinates that train.
        travels: bool (n,), trained coordinates that do not stay with the client.
        index: positions of these among the n; None if all travel.
        space: the tensors' names; None where nothing reads them.
        size: number of coordinates that travel.
        frozen: number of coordinates that neither train nor stay with the client.

    """

    subspace: Subspace
    travels: Tensor
    index: Tensor | None
    space: ParamSpace | None
    size: int
    frozen: int

    @classmethod
    def of(cls, trained: Tensor, local: Tensor, space: ParamSpace | None) -> Sendable:
        """Build from the coordinates that train, and those that stay with the client: bool (P,)."""
        local = local.to(trained.device)
        travels, frozen = ~local[trained], int((~trained & ~local).sum())
        index = None if bool(travels.all()) else travels.nonzero().squeeze(1)
        travels = travels.new_ones(()).expand(len(travels)) if index is None else travels  # one byte, not n
        size = len(travels) if index is None else len(index)
        return cls(Subspace(trained), travels, index, space, size, frozen)

    @cached_property
    def layout(self) -> Layout:
        """The tensors of the n coordinates, which take two rows of memory and sparsifiers alone read."""
        return _layout(self.space, self.subspace.mask)

    @cached_property
    def sent(self) -> Layout:
        """The tensors of the coordinates that travel."""
        return self.layout.at(self.index)


@dataclass(frozen=True)
class Sent:
    """What one client sends of its row.

    Attributes:
        index: positions (m,) among the n that it may send; None for all.
        values: (m,) changes, or values after training.
        start: (m,) values before training.
        marks: bool (m,), what the sparsifier chose; None without one.

    """

    index: Tensor | None
    values: Tensor
    start: Tensor
    marks: Tensor | None


class Exchange:
    """Encodes updates as payloads, and decodes them.

    Without a sparsifier every trained coordinate is sent; both sides have the mask, so no positions travel. If each
    client has a mask, it sends the coordinates of its mask, and receives those that some client trains.

    Args:
        trained: bool (P,), coordinates that at least one client trains; both sides have it.
        local: bool (P,), coordinates that stay with the client.
        masks: gives the masks of K clients, bool (K, P), each client's the same until ``follow``; None if all train the
            same coordinates.
        rule: the sparsifier, which chooses the coordinates that each client sends; None sends all.
        payload: ``change``, or ``value`` for the values after training.
        filters: by name, in the order in which they change an update; None is left out.
        compat: ``original`` reads unsent coordinates of a tensor as values of 0, as FL4Health's sparse exchanger does.
        space: the tensors' names; None if the sparsifier needs none.

    Attributes:
        sendable: the coordinates that may travel.
        counts: by client, how many coordinates its own mask lets it send, once they were counted.
        per_coordinate: whether clients send different coordinates, so that each is averaged over those who sent it.

    Raises:
        ValueError: an unknown payload, or a compatibility that needs another one; or each client has a mask where every
            coordinate is sent.

    """

    whole = False  # whether coordinates that do not train are sent too

    def __init__(
        self,
        trained: Tensor,
        local: Tensor,
        masks: OwnMasks | None = None,
        rule: Sparsifier | None = None,
        payload: str = "change",
        filters: Mapping[str, Filter | None] | None = None,
        compat: str | None = None,
        space: ParamSpace | None = None,
    ) -> None:
        check_choice("exchange.payload", payload, *PAYLOADS)
        if self.whole and masks is not None:
            raise ValueError(
                "mask.owner=client and lora.ranks need exchange=masked: each client sends what it trains itself"
            )
        if compat and payload != "value":
            raise ValueError("exchange.compat=original sends values: set exchange.payload=value and no feedback")
        self.masks, self.rule, self.payload, self.compat = masks, rule, payload, compat
        self.filters = [chosen for chosen in (filters or {}).values() if chosen is not None]
        self.local, self.space = local, space
        self.per_coordinate = masks is not None or rule is not None
        self.sendable = Sendable.of(trained, local, space)
        self.counts: dict[int, int] = {}

    def follow(self, trained: Tensor) -> None:
        """Set the coordinates that train, bool (P,), on the device of the updates."""
        self.sendable, self.counts = Sendable.of(trained, self.local, self.space), {}

    @property
    def size(self) -> int:
        """Number of trained coordinates that may travel."""
        return self.sendable.size

    @property
    def padding(self) -> int:
        """Number of frozen coordinates that ``Full`` sends, as zeros after the trained ones."""
        return self.sendable.frozen * self.whole

    def move(self, carry: Carry) -> None:
        """Take over another mask, between two rounds."""
        self.follow(carry.after.mask)

    @property
    def feedback(self) -> bool:
        """Whether a filter carries the unsent part of updates over to the next round."""
        return any(chosen.carries for chosen in self.filters)

    @property
    def stores(self) -> dict[str, ClientStore]:
        """Stores of the clients' rows that the filters need, by name."""
        return {name: store for chosen in self.filters for name, store in chosen.stores.items()}

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Replace the filters' stores by those that ``make`` builds by name."""
        for chosen in self.filters:
            chosen.keep_in(make)

    def encode(self, update: Update) -> Payload:
        """Encode an update, after all filters: what arrives of it, and the bytes of each message, which none writes.

        Both ends of a simulation are here. So coordinates are chosen, values rounded and bytes counted where the update
        lies, and the host waits for its device once at the most; ``messages`` writes the messages.

        Raises:
            ValueError: what no message can hold: NaN or infinity in 8 bits, a negative weight.

        """
        if not self.filters:
            return self._send(update)
        send: Send = self._send
        for chosen in reversed(self.filters):
            send = partial(chosen, send=send, exchange=self)
        return send(update)

    def decode(self, payload: Payload, weight: Sequence[float] | None = None) -> Update:
        """Decode K updates: unsent coordinates are zero, and an implausible or non-finite update is refused.

        Args:
            payload: the messages; or what arrives, if none were written.
            weight: upper bounds of the K weights, which the server derives itself; None: the senders' weights.

        Raises:
            PayloadError: a message is broken.

        """
        arrived = None if payload.written else payload.arrived
        update = self._received(payload) if arrived is None else arrived
        update = _absent_is_zero(update, self.sendable.layout) if self.compat else update
        return admit(update, payload.update.weight if weight is None else weight, between=arrived is None)

    def messages(self, payload: Payload) -> list[bytes]:
        """Write each client's message, which ``encode`` only counts."""
        if payload.written:
            return list(payload.written)
        return [self._message(payload.update, k) for k in range(len(payload.update.clients))]

    def _send(self, update: Update) -> Payload:
        """Send what filters made of an update."""
        if self.rule is not None or update.dtype not in (None, update.rows.dtype) or self.payload != "change":
            return self._chosen(update)
        update = finite(update) if self.filters else update  # whose output may not be finite
        extra, dtype = update.extra, update.rows.dtype
        allowed = None if self.masks is None else self._allowed(update.clients)
        if allowed is None:
            whole = self.sendable.size + self.sendable.frozen * self.whole
            sizes = (known_size(whole, extra, dtype),) * len(update.clients)
        else:
            sizes = tuple(known_size(count, extra, dtype) for count in self._counts(update.clients, allowed))
        if allowed is None and self.sendable.index is None:
            return Payload(update, sizes, arrived=update)
        rows = torch.where(self.sendable.travels if allowed is None else allowed, update.rows, 0.0)
        arrived = replace(update, rows=rows, sent=allowed)
        return Payload(arrived, sizes, arrived=arrived)

    def _chosen(self, update: Update) -> Payload:
        """Choose, round and count, and read all numbers of the cohort at once."""
        for weight, steps in zip(update.weight, _steps(update), strict=True):
            check_sendable(update.rows.dtype, update.dtype or update.rows.dtype, weight, steps)
        if self.filters and update.rows.device.type == "cpu":  # where testing first costs no wait
            update = finite(update)
        arrived, figures = self._arriving(update)
        fits, values, positions, before, after = figures.T.tolist()  # the only wait for the device
        if self.filters and (sound := finite(update, before)) is not update:
            return self._chosen(sound)  # without NaN, which has no order, and no 8-bit steps
        if not all(fits):
            raise ValueError(UNFIT)
        arrived = finite(arrived, after)
        dtypes, pairs = (update.dtype or update.rows.dtype, update.rows.dtype), zip(values, positions, strict=True)
        sizes = tuple(counted_size(int(count), int(places), update.extra, *dtypes) for count, places in pairs)
        return Payload(update, sizes, arrived=arrived)

    def _arriving(self, update: Update) -> tuple[Update, Tensor]:
        """Compute what arrives of an update, and five numbers of each client, float64 (K, 5), on its device.

        These are whether its values fit their dtype, how many travel, the bytes of their positions, and the sums of the
        update and of what arrives, which are finite only if all values are.
        """
        allowed = self._allowed(update.clients)
        if allowed is not None:
            self._counts(update.clients, allowed)  # of all K at once
        masks = [None] * len(update.clients) if allowed is None else allowed
        parts = [
            self._arrive(self._sent(update, k, mask), update.rows[k], update.dtype) for k, mask in enumerate(masks)
        ]
        rows, marks = (torch.stack(part) for part in zip(*(part[:2] for part in parts), strict=True))
        exact = update.rows.dtype
        arrived = replace(
            update,
            rows=rows,
            sent=marks if self.per_coordinate else None,
            buffers=update.buffers.to(exact).to(update.buffers.dtype),
            variates=None if update.variates is None else update.variates.to(exact),
            steps=_steps(update),
        )
        sums = torch.stack([row_sums(part.rows, part.buffers).double() for part in (update, arrived)], 1)
        return arrived, torch.cat([torch.stack([part[2] for part in parts]), sums], 1)

    def _arrive(self, sent: Sent, like: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what arrives of one client's row: change (n,), sent bool (n,), and three numbers of ``_arriving``."""
        values, fits = as_read(sent.values, sent.marks, dtype or like.dtype)
        values = values - sent.start if self.payload == "value" else values
        if sent.marks is None:
            marks, positions = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(fits)
            count = torch.full_like(fits, len(values) + self.padding, dtype=torch.float64)
        else:
            marks, values, count = sent.marks, torch.where(sent.marks, values, 0.0), sent.marks.count_nonzero()
            positions = torch.zeros_like(fits) if self._shares else positions_size(marks)
        numbers = torch.stack([part.double() for part in (fits, count, positions)])
        if sent.index is None:
            return values, marks, numbers
        row, whole = torch.zeros_like(like), torch.zeros_like(like, dtype=torch.bool)
        row[sent.index], whole[sent.index] = values, marks
        return row, whole, numbers

    def _message(self, update: Update, k: int) -> bytes:
        """Write one client's message."""
        allowed = self._allowed(update.clients[k : k + 1])
        sent = self._sent(update, k, None if allowed is None else allowed[0])
        values, marks = sent.values, sent.marks
        if self._shares:
            assert marks is not None
            values, marks = values[marks], None
        values = torch.nn.functional.pad(values, (0, self.padding)) if self.padding else values
        return encode(
            values,
            marks,
            dtype=update.dtype,
            buffers=torch.cat([part[k] for part in (update.buffers, update.variates) if part is not None]),
            weight=update.weight[k],
            loss=update.loss[k],
            steps=_steps(update)[k],
        )

    def _sent(self, update: Update, k: int, allowed: Tensor | None) -> Sent:
        """Gather what one client sends: the values that it may send, and the sparsifier's choice of these."""
        index = self._positions(update.clients[k], allowed)
        change = _at(update.rows[k], index)
        start = torch.zeros_like(change) if update.start is None else _at(update.start[k], index)
        values_now = None if self.filters else update.values  # filters may have changed the change
        theta = start + change if values_now is None else _at(values_now[k], index)
        marks = self._marks(theta, start, index, update, k)
        return Sent(index, change if self.payload == "change" else theta, start, marks)

    def _marks(self, theta: Tensor, start: Tensor, index: Tensor | None, update: Update, k: int) -> Tensor | None:
        """Mark the coordinates that the sparsifier chooses, of those that a client may send; None without one."""
        if self.rule is None:
            return None
        layout = self.sendable.sent if self.masks is None else self.sendable.layout.at(index)
        return self.rule.mark(theta, start, layout, Sender(max(0, update.clients[k]), update.round))

    def _received(self, payload: Payload) -> Update:
        """Decode the written messages of K clients."""
        update = payload.update
        parts = [self._read(message, update, k) for k, message in enumerate(payload.written)]
        sent = torch.stack([part for _, part, _ in parts])
        messages, extra = [message for _, _, message in parts], update.buffers.shape[1]
        other = {k: len(m.buffers) for k, m in enumerate(messages) if len(m.buffers) != update.extra}
        none = update.rows.new_zeros(update.extra)
        exact = torch.stack([none if k in other else m.buffers.to(none) for k, m in enumerate(messages)])
        buffers, variates = exact[:, :extra], exact[:, extra:]
        received = replace(
            update,
            rows=torch.stack([row for row, _, _ in parts]),
            sent=sent if self.per_coordinate else None,
            buffers=buffers.to(update.buffers.dtype),
            variates=None if update.variates is None else variates,
            weight=tuple(message.weight for message in messages),
            loss=tuple(message.loss for message in messages),
            steps=tuple(message.steps for message in messages),
        )
        model = f"buffer values, where the model has {update.extra}"
        return refuse(received, {k: f"{count} {model}" for k, count in other.items()}) if other else received

    def _read(self, message: bytes, update: Update, k: int) -> tuple[Tensor, Tensor, Message]:
        """Decode one client's message: change (n,), sent bool (n,), and the whole content."""
        like, start = update.rows[k], update.start_values[k]
        allowed = self._allowed(update.clients[k : k + 1])
        index = self._positions(update.clients[k], None if allowed is None else allowed[0])
        shared = self._shared(index, update, k)
        positions = index if shared is None else (shared.nonzero().squeeze(1) if index is None else index[shared])
        content = read(message, (len(like) if positions is None else len(positions)) + self.padding, dtype=like.dtype)
        values, marks = (part[: len(part) - self.padding].to(like.device) for part in (content.values, content.sent))
        if self.payload == "value":
            values = torch.where(marks, values - _at(start, positions), 0.0)
        row, sent = torch.zeros_like(like), torch.zeros(len(like), dtype=torch.bool, device=like.device)
        if positions is None:
            return values, marks, content
        row[positions], sent[positions] = values, marks
        return row, sent, content

    def _shared(self, index: Tensor | None, update: Update, k: int) -> Tensor | None:
        """Mark the choice of a shared sparsifier, which the receiver computes without values; None for others."""
        if not self._shares:
            return None
        nothing = _at(torch.zeros_like(update.rows[k]), index)
        return self._marks(nothing, nothing, index, update, k)

    @property
    def _shares(self) -> bool:
        """Whether the receiver computes the sparsifier's choice itself."""
        return self.rule is not None and self.rule.shared

    def _allowed(self, clients: Sequence[int]) -> Tensor | None:
        """Mark what each of K clients may send, bool (K, n); None if all clients have the same mask."""
        if self.masks is None:
            return None
        allowed = self.masks(clients)
        assert allowed is not None  # ``masks`` is given only if each client has a mask
        return self.sendable.subspace.of(allowed) & self.sendable.travels

    def _counts(self, clients: Sequence[int], allowed: Tensor) -> list[int]:
        """Count what each of K clients may send, bool (K, n); the host waits where one's was not counted before."""
        new = [k for k, client in enumerate(clients) if client not in self.counts]
        if new:
            found = allowed.sum(1).tolist()
            self.counts |= {clients[k]: found[k] for k in new}
        return [self.counts[client] for client in clients]

    def _positions(self, client: int, allowed: Tensor | None) -> Tensor | None:
        """List the positions among the n that a client may send, of its mask bool (n,) if it has one; None for all."""
        if allowed is None:
            return self.sendable.index
        return where_true(allowed, *self._counts([client], allowed.unsqueeze(0)))


class Full(Exchange):
    """Sends every coordinate, frozen ones included.

    Raises:
        ValueError: each client has a mask, and would send coordinates that it does not train.

    """

    whole = True


def _layout(space: ParamSpace | None, trained: Tensor) -> Layout:
    """Build the layout of the trained coordinates."""
    if space is None:
        return Layout(("row",), torch.zeros(int(trained.sum()), dtype=torch.long, device=trained.device))
    owner = torch.arange(len(space.names)).repeat_interleave(torch.tensor(space.sizes, dtype=torch.long))
    return Layout(space.names, owner.to(trained.device)[trained])


def _steps(update: Update) -> tuple[float, ...]:
    """Sums of step weights as a message has them: 0 if unknown."""
    return update.steps or (0.0,) * len(update.clients)


def _at(row: Tensor, index: Tensor | None) -> Tensor:
    return row if index is None else row[index]


def _absent_is_zero(update: Update, layout: Layout) -> Update:
    """Treat each tensor with a sent coordinate as sent whole, with values of 0 at unsent coordinates."""
    assert update.sent is not None
    whole = torch.zeros(len(update.rows), len(layout.names), device=update.rows.device)
    whole.index_add_(1, layout.owner, update.sent.to(whole.dtype))
    tensors = (whole > 0)[:, layout.owner]
    rows = torch.where(update.sent, update.rows, torch.where(tensors, -update.start_values, 0.0))
    return replace(update, rows=rows, sent=tensors)
