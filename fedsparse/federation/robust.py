"""Averages of K rows, plain and robust: pure functions, in float64.

Shapes: values (K, P), sent bool (K, P), weight (K,) -> mean (P,), touched bool (P,). A row of weight 0 (dropped, or
padding) never matters, whatever it holds; a coordinate that nobody sent is 0 and untouched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DENOMINATORS = ("senders", "participants")
_TOLERANCE = 1e-9
Averaged = tuple[Tensor, Tensor]


def weighted_mean(values: Tensor, sent: Tensor, weight: Tensor) -> Averaged:
    r"""Average over all, :math:`\sum_k w_k v_k / \sum_k w_k` (FedAvg, McMahan et al. 2017); not sent means 0."""
    return coordinate_mean(values, sent, weight, "participants")


def coordinate_mean(values: Tensor, sent: Tensor, weight: Tensor, denominator: str = "senders") -> Averaged:
    """Average each coordinate over those who sent it, or over all participants.

    Args:
        values: (K, P).
        sent: bool (K, P).
        weight: (K,).
        denominator: ``senders`` or ``participants``; the latter takes what was not sent as 0.

    Raises:
        ValueError: another denominator.

    """
    check_denominator(denominator)
    values, sent, weight = _counted(values, sent, weight)
    summed = (weight[:, None] * values).sum(0)
    senders = (weight[:, None] * sent).sum(0)
    touched = senders > 0
    divisor = senders if denominator == "senders" else weight.sum().expand_as(senders)
    return torch.where(touched, summed / torch.where(touched, divisor, 1.0), 0.0), touched


def check_denominator(denominator: str) -> None:
    """Refuse an unknown denominator.

    Raises:
        ValueError: says what it may be.

    """
    if denominator not in DENOMINATORS:
        raise ValueError(f"aggregation.denominator is {denominator!r}; it must be senders or participants")


def trimmed_mean(values: Tensor, sent: Tensor, weight: Tensor, trim: float = 0.2) -> Averaged:
    """Average each coordinate over its m senders without the floor(trim * m) smallest and as many largest values.

    Unweighted (Yin et al. 2018).

    Raises:
        ValueError: a share outside [0, 0.5).

    """
    if isinstance(trim, bool) or not isinstance(trim, int | float) or not 0 <= trim < 0.5:
        raise ValueError(f"aggregation.average.trim is {trim!r}; it must be 0 or more and below 0.5")
    values, sent, _ = _counted(values, sent, weight)
    senders = sent.sum(0)
    low = (trim * senders + _TOLERANCE).floor().long()
    return _middle(values, sent, low, senders - low), senders > 0


def median(values: Tensor, sent: Tensor, weight: Tensor) -> Averaged:
    """Take the median of each coordinate's senders, unweighted; the mean of the two middle ones of an even number."""
    values, sent, _ = _counted(values, sent, weight)
    senders = sent.sum(0)
    low = (senders - 1).clamp(min=0) // 2
    return _middle(values, sent, low, torch.maximum(senders - low, low + (senders > 0))), senders > 0


def _middle(values: Tensor, sent: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Average the sent values of each coordinate, in ascending order, from ``low`` to before ``high`` (P,)."""
    ordered = torch.where(sent, values, math.inf).sort(0).values
    place = torch.arange(len(values), device=values.device)[:, None]
    taken = (place >= low) & (place < high)
    return torch.where(taken, ordered, 0.0).sum(0) / (high - low).clamp(min=1)


def krum(values: Tensor, sent: Tensor, weight: Tensor, attackers: int = 1) -> Averaged:
    """Take the row that lies nearest to its n - attackers - 2 nearest others (Blanchard et al. 2017).

    Ties go to the lowest index.

    Raises:
        ValueError: fewer than attackers + 3 rows.

    """
    values, sent, weight = _counted(values, sent, weight)
    chosen = _krum_order(values, attackers)[0]
    return values[chosen], sent[chosen]


def multi_krum(values: Tensor, sent: Tensor, weight: Tensor, attackers: int = 1, keep: int | None = None) -> Averaged:
    """Average, by weight and over the senders, the rows that Krum ranks first.

    Args:
        values: (K, P).
        sent: bool (K, P).
        weight: (K,).
        attackers: how many rows may be anything.
        keep: how many are averaged; all but ``attackers`` by default.

    Raises:
        ValueError: fewer than attackers + 3 rows.

    """
    values, sent, weight = _counted(values, sent, weight)
    best = _krum_order(values, attackers)[: len(values) - attackers if keep is None else keep]
    return coordinate_mean(values[best], sent[best], weight[best])


def _krum_order(values: Tensor, attackers: int) -> Tensor:
    """Order rows by the sum of their squared distances to their nearest others, ties by index."""
    n = len(values)
    if n < attackers + 3:
        raise ValueError(f"{attackers} attackers need {attackers + 3} clients in a round; there are {n}")
    squares = torch.stack([(values - row).square().sum(1) for row in values])
    squares.fill_diagonal_(math.inf)
    return squares.sort(1).values[:, : n - attackers - 2].sum(1).argsort(stable=True)


def geometric_median(
    values: Tensor, sent: Tensor, weight: Tensor, steps: int = 1000, smoothing: float = 1e-10
) -> Averaged:
    """Take the point whose weighted distances to the rows sum to the least (RFA, Pillutla et al. 2022, algorithm 2).

    Args:
        values: (K, P).
        sent: bool (K, P); what was not sent is 0.
        weight: (K,).
        steps: at most so many of Weiszfeld's steps; fewer once a step moves no coordinate.
        smoothing: least distance, as a share of the rows' mean norm.

    """
    values, sent, weight = _counted(values, sent, weight)
    touched = sent.any(0)
    if not len(values):
        return values.new_zeros(values.shape[1]), touched
    point, least = (weight[:, None] * values).sum(0) / weight.sum(), smoothing * values.norm(dim=1).mean() + 1e-300
    for _ in range(steps):
        share = weight / (values - point).norm(dim=1).clamp(min=float(least))
        moved = (share[:, None] * values).sum(0) / share.sum()
        done = torch.allclose(moved, point, rtol=1e-12, atol=1e-15)
        point = moved
        if done:
            break
    return point, touched


def _counted(values: Tensor, sent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the rows that count, in float64, with 0 where nothing was sent."""
    rows = weight > 0
    sent = sent[rows].bool()
    return torch.where(sent, values[rows].double(), 0.0), sent, weight[rows].double()
