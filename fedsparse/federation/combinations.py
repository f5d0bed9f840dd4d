"""Which exchange, aggregation and objective go together; what does not is refused before anything is trained."""

from __future__ import annotations

from typing import Any

from fedsparse.federation.aggregation import Aggregation, FedNova, Robust
from fedsparse.federation.exchange import Exchange
from fedsparse.federation.objective import Objective
from fedsparse.federation.selection import check_fraction


def check_together(exchange: Exchange, aggregation: Aggregation, objective: Objective) -> None:
    """Refuse parts that would give wrong results together.

    Raises:
        ValueError: one line that says what to set.

    """
    if exchange.feedback and (exchange.payload, aggregation.denominator) != ("change", "participants"):
        raise ValueError(
            "exchange.feedback carries changes over, and divided by their senders alone they would count in full: set "
            "exchange.payload=change aggregation=coordinate_mean aggregation.denominator=participants"
        )
    if exchange.compat and (aggregation.denominator != "senders" or isinstance(aggregation, FedNova)):
        raise ValueError("exchange.compat=original averages over senders: set aggregation=coordinate_mean")
    if objective.messages and exchange.own:
        raise ValueError("objective=scaffold needs exchange=full or exchange=masked, with one mask for all clients")


def check_sizes(exchange: Exchange, aggregation: Aggregation, clients: int, taking_part: int) -> None:
    """Refuse what does not fit the number of clients, or of those that take part in a round.

    Raises:
        ValueError: one line that says what would fit.

    """
    fraction = getattr(exchange.rule, "fraction", None)
    if fraction is not None:
        check_fraction(fraction, clients)
    options: dict[str, Any] = getattr(aggregation.average, "keywords", {}) if isinstance(aggregation, Robust) else {}
    attackers = options.get("attackers")
    if attackers is not None and not 0 <= attackers <= taking_part - 3:
        raise ValueError(
            f"aggregation.average.attackers is {attackers!r}; of {taking_part} clients in a round it must be 0 to "
            f"{taking_part - 3}"
        )
