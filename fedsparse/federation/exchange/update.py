"""What the server sends the clients of a cohort, what they changed, and what of that is on its way back.

Shapes: K clients of the cohort, P coordinates of which n train, Q buffer values. Rows hold trained coordinates only:
nothing else can change. Nothing here knows of the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsparse.federation.exchange.wire.message import Size
from fedsparse.federation.stores.store import Kept


@dataclass(frozen=True)
class Start:
    """What the server sends K clients.

    Attributes:
        values: (K, n) where each starts.
        lr: their learning rate in this round.
        group: the global row that each starts from.
        patience: epochs without a better loss after which a client stops; None: none stops early.
        epochs: passes over its samples that a client makes, which ``patience`` counts.

    """

    values: Tensor
    lr: float
    group: tuple[int, ...]
    patience: int | None = None
    epochs: int = 1


@dataclass(frozen=True)
class Update:
    """What K clients changed in a round.

    Attributes:
        clients: K ids; below 0 is a padding row.
        rows: (K, n) change of each coordinate that trains; the next cohort's may lie in the same memory.
        buffers: (K, Q) change of the float buffers.
        weight: K weights in the average.
        loss: K mean training losses.
        sent: bool (K, n), which coordinates each client sent, where that differs between them; None: all alike.
        anchor: (K, n) values that the clients started from, which both sides know; None where nothing asks for them.
        values: (K, n) values that training ended with: start plus change is rounded once more. None where nobody said.
        round: the round.
        steps: K sums of step weights (``drift.step_weight``); empty where nobody said.
        variates: (K, n) what an objective sends of each coordinate that trains, never rounded; None: nothing.
        dtype: of the values on the wire; None for the rows' own.
        refused: rows that do not count, which have weight 0, and why.
        kept: what the clients keep for themselves if their update counts: their ids, and a row each, by the store.
        local_steps: that they took, all together.
        clipped: how many of these had their gradient clipped.

    """

    clients: tuple[int, ...]
    rows: Tensor
    buffers: Tensor
    weight: tuple[float, ...]
    loss: tuple[float, ...]
    sent: Tensor | None = None
    anchor: Tensor | None = None
    values: Tensor | None = None
    round: int = 0
    steps: tuple[float, ...] = ()
    variates: Tensor | None = None
    dtype: torch.dtype | None = None
    refused: Mapping[int, str] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    local_steps: int = 0
    clipped: int = 0

    @property
    def extra(self) -> int:
        """Values that each client sends beside its row, exactly: buffers and variates."""
        return self.buffers.shape[1] + (0 if self.variates is None else self.variates.shape[1])

    @property
    def start(self) -> Tensor:
        """Values that the clients started from; zeros where nobody said."""
        return torch.zeros_like(self.rows) if self.anchor is None else self.anchor


@dataclass(frozen=True)
class Payload:
    """What K clients send.

    Where both sides know the positions and no value is rounded, the values stay where they are, and the lengths are
    those that the messages would have: a simulation need not copy every update to the host to count it.

    Attributes:
        update: the update without its rows, if there are messages; else with what is sent in them.
        sizes: bytes of each client's message.
        written: the messages, or empty where they need not be written.
        kept: what the clients keep of what they did not send, as ``Update.kept``.

    """

    update: Update
    sizes: tuple[Size, ...]
    written: tuple[bytes, ...] = ()
    kept: Kept = field(default_factory=dict)
