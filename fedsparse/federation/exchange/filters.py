"""Filters of updates: error feedback, quantization, an attack. They compose in the order of the YAML.

Shapes: K clients of the cohort, n coordinates that train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedsparse.core.checks import check_choice, check_number
from fedsparse.federation.exchange.exchange import Exchange, Filter, Send
from fedsparse.federation.exchange.update import Payload, Update, of_those
from fedsparse.federation.stores.store import ClientStore, MemoryStore, read

RESIDUAL = "residuals"
PRECISIONS = {None: None, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class ErrorFeedback(Filter):
    """Error feedback: the residual, which a message leaves out or rounds away, is added to the client's next change.

    Sent plus new residual equals old residual plus change (Stich et al. 2018, algorithm 1; Karimireddy et al. 2019).

    Args:
        decay: factor of the old residual, above 0 and at most 1.
        store: of the residuals; in memory by default.

    Raises:
        ValueError: a decay out of range.

    """

    carries = True

    def __init__(self, decay: float = 1.0, store: ClientStore | None = None) -> None:
        check_number("exchange.feedback", decay, above=0, most=1)
        super().__init__()
        self.decay = decay
        self.stores[RESIDUAL] = MemoryStore() if store is None else store

    def __call__(self, update: Update, send: Send, exchange: Exchange) -> Payload:
        """Add the residual, send, and keep the difference to the decoded update as the new residual, where it is.

        It is finite where both are: what the exchange itself leaves out or rounds away is no larger than the value.
        """
        carried = read(self.stores[RESIDUAL], update.clients, torch.zeros_like(update.rows))
        wanted = update.rows + self.decay * carried
        payload = send(replace(update, rows=wanted))
        arrived = exchange.decode(payload)
        left = torch.where(exchange.sendable.travels, wanted - arrived.rows, 0.0)
        changed = payload.update.rows is not wanted  # by a filter after this one, or because some were refused
        kept = of_those({RESIDUAL: (arrived.clients, left)}, arrived, known=not changed)  # a dropped one's stays
        return replace(payload, kept=payload.kept | kept)


class Quantize(Filter):
    """Quantization: values are sent in fewer bits.

    Args:
        dtype: ``float16``, ``bfloat16``, or ``int8`` for 8-bit steps of the largest of each 256 values; None: the
            rows' dtype.

    Raises:
        ValueError: an unknown dtype.

    """

    def __init__(self, dtype: str | None) -> None:
        super().__init__()
        check_choice("exchange.precision", dtype, *PRECISIONS)
        self.dtype = PRECISIONS[dtype]

    def __call__(self, update: Update, send: Send, exchange: Exchange) -> Payload:
        """Set the dtype of the message, and send."""
        return send(replace(update, dtype=self.dtype))


class SignFlip(Filter):
    """Sign-flipping attack: some clients send their update times ``-scale``.

    Args:
        clients: ids of the attackers, or their number: then the first ones.
        scale: factor of the reversed update.

    Attributes:
        last: highest id of an attacker, -1 without any.

    Raises:
        ValueError: neither a number of clients nor ids, or a scale that is no finite number.

    """

    def __init__(self, clients: int | Sequence[int] = 0, scale: float = 10.0) -> None:
        super().__init__()
        ids = [clients] if isinstance(clients, int) else clients
        counts = isinstance(ids, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in ids)
        if not counts or any(n < 0 for n in ids):
            raise ValueError(
                f"exchange.attackers is {clients!r}; it must be null, how many clients attack, or a list of their ids"
            )
        check_number("exchange.attack_scale", scale, double=True)
        self.clients = range(clients) if isinstance(clients, int) else frozenset(clients)
        self.last = clients - 1 if isinstance(clients, int) else max(clients, default=-1)
        self.scale = scale

    def __call__(self, update: Update, send: Send, exchange: Exchange) -> Payload:
        """Multiply the attackers' rows by ``-scale``, and send."""
        factors = [-self.scale if client in self.clients else 1.0 for client in update.clients]
        return send(replace(update, rows=update.rows * update.rows.new_tensor(factors).unsqueeze(1)))


def feedback(decay: float | None, **options: Any) -> ErrorFeedback | None:
    """Build the filter of ``exchange.feedback``; none if it is null."""
    return None if decay is None else ErrorFeedback(decay, **options)


def precision(dtype: str | None) -> Quantize | None:
    """Build the filter of ``exchange.precision``; none if it is null."""
    return None if dtype is None else Quantize(dtype)


def sign_flip(clients: int | Sequence[int] | None, scale: float) -> SignFlip | None:
    """Build the attack of ``exchange.attackers``; none if it is null."""
    return None if clients is None else SignFlip(clients, scale)
