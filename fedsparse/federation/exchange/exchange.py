"""What of an update is sent, and what the receiver reads.

Shapes: K clients of the cohort, P coordinates of which n train, Q buffer values. An update holds trained coordinates
only: nothing else can change. Nothing here knows of the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Carry
from fedsparse.federation.exchange.sparsifiers import Layout, Sender, Sparsifier
from fedsparse.federation.exchange.update import Payload, Update, admit, finite, refuse
from fedsparse.federation.exchange.wire.message import Message, encode, known_size, read, split_size
from fedsparse.federation.stores.store import ClientStore

OwnMasks = Callable[[Sequence[int]], Tensor | None]
PAYLOADS = ("change", "value")


Send = Callable[[Update], Payload]


class Filter:
    """Changes an update on its way; the first of a list sees it first and hears last what became of it.

    Attributes:
        carries: whether what is not sent is carried over to the next round.
        stores: what the clients keep for it, by name.

    """

    carries = False

    def __init__(self) -> None:
        self.stores: dict[str, ClientStore] = {}

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Let the clients keep what it needs in other stores, made by name."""
        self.stores = {name: make(name) for name in self.stores}

    def __call__(self, update: Update, send: Send, exchange: Exchange) -> Payload:
        """Send an update on; ``exchange.decode`` says what the receiver reads."""
        return send(update)


@dataclass(frozen=True)
class Sendable:
    """Which of the coordinates that train may travel.

    Attributes:
        trained: bool (P,), which coordinates train.
        travels: bool (n,), which of these do not stay with the client.
        layout: the tensors that they belong to.
        all: whether all travel.
        size: how many do.
        frozen: coordinates that neither train nor stay with the client.

    """

    trained: Tensor
    travels: Tensor
    layout: Layout
    all: bool
    size: int
    frozen: int

    @classmethod
    def of(cls, trained: Tensor, local: Tensor, space: ParamSpace | None) -> Sendable:
        """Find them, for coordinates that train and those that stay with the client: bool (P,)."""
        local = local.to(trained.device)
        travels, frozen = ~local[trained], int((~trained & ~local).sum())
        return cls(trained, travels, _layout(space, trained), bool(travels.all()), int(travels.sum()), frozen)


class Exchange:
    """Turns updates into payloads and back.

    Without a rule every trained coordinate is sent; both sides know the mask, so no positions travel. Where each client
    has a mask of its own, it sends the coordinates of that, and receives those that anybody trains.

    Args:
        trained: bool (P,), which coordinates train, of some client at least; both sides know it.
        local: bool (P,), which coordinates stay with the client.
        masks: gives the own masks of K clients, bool (K, P); None if all train the same coordinates.
        rule: chooses what each client sends; None for all that it may.
        payload: ``change``, or ``value`` for what the coordinates are now.
        filters: by name, in the order in which they see an update; None is left out.
        compat: ``original`` takes what was not sent of a tensor as values of 0, as FL4Health's sparse exchanger does.
        space: the tensors' names; None where no rule asks for them.

    Attributes:
        sendable: which coordinates may travel.
        per_coordinate: whether clients send different coordinates, so that each is averaged over those who sent it.

    Raises:
        ValueError: an unknown payload, or a compatibility that needs another one.

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
        if compat and payload != "value":
            raise ValueError("exchange.compat=original sends values: set exchange.payload=value and no feedback")
        self.masks, self.rule, self.payload, self.compat = masks, rule, payload, compat
        self.filters = [chosen for chosen in (filters or {}).values() if chosen is not None]
        self.local, self.space = local, space
        self.per_coordinate = masks is not None or rule is not None
        self.sendable = Sendable.of(trained, local, space)

    def follow(self, trained: Tensor) -> None:
        """Let these coordinates train from now on, bool (P,); updates lie on its device."""
        self.sendable = Sendable.of(trained, self.local, self.space)

    @property
    def size(self) -> int:
        """Coordinates that may travel, of those that train."""
        return self.sendable.size

    @property
    def padding(self) -> int:
        """Coordinates that do not train and are sent all the same, as zeros behind the others."""
        return self.sendable.frozen * self.whole

    def move(self, carry: Carry) -> None:
        """Let other coordinates train, between two rounds."""
        self.follow(carry.after.mask)

    @property
    def feedback(self) -> bool:
        """Whether what is not sent is carried over to the next round."""
        return any(chosen.carries for chosen in self.filters)

    @property
    def stores(self) -> dict[str, ClientStore]:
        """What the clients keep for the filters, by name."""
        return {name: store for chosen in self.filters for name, store in chosen.stores.items()}

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Let the clients keep what filters need in other stores, made by name."""
        for chosen in self.filters:
            chosen.keep_in(make)

    def encode(self, update: Update) -> Payload:
        """Send an update through the filters."""
        if not self.filters:
            return self._send(update)
        send: Send = self._send
        for chosen in reversed(self.filters):
            send = partial(chosen, send=send, exchange=self)
        return send(update)

    def decode(self, payload: Payload, weight: Sequence[float] | None = None) -> Update:
        """Read what the clients changed; what was not sent is zero, and who cannot be believed does not count.

        Args:
            payload: what they send.
            weight: the most that the receiver knows that each may weigh, without being told; None: as the sender says.

        Raises:
            PayloadError: a message is broken.

        """
        update = self._received(payload) if payload.written else payload.update
        update = _absent_is_zero(update, self.sendable.layout) if self.compat else update
        between = bool(payload.written or self.filters or self.compat)
        return admit(update, payload.update.weight if weight is None else weight, between)

    def messages(self, payload: Payload) -> list[bytes]:
        """Write each client's message, where ``encode`` had no need to."""
        if payload.written:
            return list(payload.written)
        return [self._message(payload.update, k) for k in range(len(payload.update.clients))]

    def _send(self, update: Update) -> Payload:
        """Write messages, or only count them where both sides know the positions and no value is rounded."""
        if self.filters:  # which may have made of finite values others, that have no order and no 8-bit steps
            update = finite(update)
        extra, dtype = update.extra, update.rows.dtype
        if self.rule is not None or update.dtype not in (None, dtype) or self.payload != "change":
            written = tuple(self._message(update, k) for k in range(len(update.clients)))
            return Payload(update, tuple(split_size(message) for message in written), written)
        allowed = None if self.masks is None else self._allowed(update.clients)  # the values stay where they are
        if allowed is None:
            whole = self.sendable.size + self.sendable.frozen * self.whole
            sizes = (known_size(whole, extra, dtype),) * len(update.clients)
        else:
            sizes = tuple(known_size(count, extra, dtype) for count in allowed.sum(1).tolist())
        if allowed is None and self.sendable.all:
            return Payload(update, sizes)
        rows = torch.where(self.sendable.travels if allowed is None else allowed, update.rows, 0.0)
        return Payload(replace(update, rows=rows, sent=allowed), sizes)

    def _message(self, update: Update, k: int) -> bytes:
        """Write one client's message."""
        index = self._positions(update.clients[k])
        change, start = _at(update.rows[k], index), _at(update.start_values[k], index)
        values_now = None if self.filters else update.values  # filters may have changed the change
        theta = start + change if values_now is None else _at(values_now[k], index)
        marks = self._marks(theta, start, index, update, k)
        values = change if self.payload == "change" else theta
        if self.rule is not None and self.rule.shared:
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
            steps=update.steps[k] if update.steps else 0.0,
        )

    def _marks(self, theta: Tensor, start: Tensor, index: Tensor | None, update: Update, k: int) -> Tensor | None:
        """What the rule chooses of what a client may send."""
        if self.rule is None:
            return None
        layout = self.sendable.layout.at(index)
        return self.rule.mark(theta, start, layout, Sender(max(0, update.clients[k]), update.round))

    def _received(self, payload: Payload) -> Update:
        """Read messages, with what both sides know."""
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
        """Read one client's message: change (n,), sent bool (n,), and all that it says."""
        like = update.rows[k]
        index, start = self._positions(update.clients[k]), update.start_values[k]
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
        """What the receiver knows of a rule's choice without being told; it needs no values for that."""
        if self.rule is None or not self.rule.shared:
            return None
        nothing = _at(torch.zeros_like(update.rows[k]), index)
        return self._marks(nothing, nothing, index, update, k)

    def _allowed(self, clients: Sequence[int]) -> Tensor | None:
        """What each client may send, bool (K, n), if they have masks of their own."""
        if self.masks is None:
            return None
        allowed = self.masks(clients)
        assert allowed is not None  # there are own masks: they are why this exchange was given them
        return allowed[:, self.sendable.trained] & self.sendable.travels

    def _positions(self, client: int) -> Tensor | None:
        """Positions that a client may send, among the n; None for all."""
        allowed = self._allowed([client])
        if allowed is None and self.sendable.all:
            return None
        return (self.sendable.travels if allowed is None else allowed[0]).nonzero().squeeze(1)


class Full(Exchange):
    """Every coordinate is sent, also those that do not train.

    Raises:
        ValueError: own masks, of which this would send more than each client trains.

    """

    def __init__(self, trained: Tensor, local: Tensor, masks: OwnMasks | None = None, **options: Any) -> None:
        if masks is not None:
            raise ValueError("mask.owner=client needs exchange=masked: each client sends what its own mask trains")
        super().__init__(trained, local, **options)

    whole = True


def _layout(space: ParamSpace | None, trained: Tensor) -> Layout:
    """Which tensor each trained coordinate belongs to."""
    if space is None:
        return Layout(("row",), torch.zeros(int(trained.sum()), dtype=torch.long, device=trained.device))
    owner = torch.arange(len(space.names)).repeat_interleave(torch.tensor(space.sizes, dtype=torch.long))
    return Layout(space.names, owner.to(trained.device)[trained])


def _at(row: Tensor, index: Tensor | None) -> Tensor:
    return row if index is None else row[index]


def _absent_is_zero(update: Update, layout: Layout) -> Update:
    """Take each tensor of which something was sent whole, with values of 0 where nothing was."""
    assert update.sent is not None
    whole = torch.zeros(len(update.rows), len(layout.names), device=update.rows.device)
    whole.index_add_(1, layout.owner, update.sent.to(whole.dtype))
    tensors = (whole > 0)[:, layout.owner]
    rows = torch.where(update.sent, update.rows, torch.where(tensors, -update.start_values, 0.0))
    return replace(update, rows=rows, sent=tensors)
