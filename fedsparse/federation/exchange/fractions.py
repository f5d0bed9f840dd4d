"""The fraction that a client sends (``exchange.fraction``): one number, one for each client, or one from a round on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsparse.core.checks import finite

Fraction = float | Sequence[float] | Mapping[int, float]


def fraction_of(fraction: Fraction, round: int, client: int) -> float:
    """Look up a client's fraction in a round: a number, a list with one for each client, or a mapping from a round on.

    >>> fraction_of({0: 0.5, 3: 0.1}, 4, 0), fraction_of([0.2, 0.4], 0, 1), fraction_of(0.3, 0, 0)
    (0.1, 0.4, 0.3)
    """
    if isinstance(fraction, Mapping):
        return fraction[max(start for start in fraction if int(start) <= round)]
    return fraction[client] if isinstance(fraction, Sequence) else fraction


def check_fraction(fraction: Fraction, clients: int | None = None) -> None:
    """Refuse an invalid ``exchange.fraction``, before anything is trained.

    Raises:
        ValueError: one line with the valid forms, or the numbers of clients that differ.

    """
    listed = list(fraction.values()) if isinstance(fraction, Mapping) else fraction
    numbers = listed if isinstance(listed, Sequence) else [listed]
    good = all(finite(f) and 0 < f <= 1 for f in numbers)
    if isinstance(fraction, Mapping):
        good = good and 0 in fraction and all(isinstance(start, int) and start >= 0 for start in fraction)
    if not good or not len(numbers):
        raise ValueError(
            f"exchange.fraction is {fraction!r}; it must be above 0 and at most 1: a number, a list with one for each "
            "client, or a mapping from a round on, such as {0: 0.5, 5: 0.1}"
        )
    listed_for = len(fraction) if isinstance(fraction, Sequence) else clients
    if clients not in (None, listed_for):
        raise ValueError(f"exchange.fraction lists {listed_for} clients; there are {clients}")
