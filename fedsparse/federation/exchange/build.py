"""An exchange from the plain values of ``conf/exchange``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fedsparse.federation.exchange.exchange import Exchange, Filter
from fedsparse.federation.exchange.filters import feedback as carry
from fedsparse.federation.exchange.filters import precision as rounding
from fedsparse.federation.exchange.filters import sign_flip


def exchange_of(
    part: Any,
    *,
    payload: str = "change",
    feedback: float | None = None,
    precision: str | None = None,
    attackers: int | Sequence[int] | None = None,
    attack_scale: float = 10.0,
    compat: str | None = None,
    filters: Mapping[str, Filter | None] | None = None,
) -> Callable[..., Exchange]:
    """Make the constructor of an exchange, which still waits for what trains.

    Args:
        part: a sparsifier, which the plain exchange takes as its rule; or the constructor of another exchange, as
            ``functools.partial``.
        payload: as in ``Exchange``.
        feedback: decay of error feedback; None for none.
        precision: in which values travel; None: as they are.
        attackers: who sends its update reversed and scaled, as in ``SignFlip``; None: nobody.
        attack_scale: by how much.
        compat: as in ``Exchange``; of a sparsifier.
        filters: more of them by name; they see an update after those above, which see it in the order attack, feedback,
            precision.

    Raises:
        ValueError: an option of a filter that cannot be meant.

    """
    named = {
        "attack": sign_flip(attackers, attack_scale),
        "feedback": carry(feedback),
        "precision": rounding(precision),
    }
    options: dict[str, Any] = {"payload": payload, "filters": named | dict(filters or {})}
    if isinstance(part, partial):
        return partial(part, **options)
    return partial(Exchange, rule=part, compat=compat, **options)
