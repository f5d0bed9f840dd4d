"""Averages of K rows, plain and robust: pure functions, in float64.

Shapes: values (K, P), sent bool (K, P), weight (K,) -> mean (P,), touched bool (P,). A row of weight 0 has no effect,
whatever its values. A lost row, of positive weight but with NaN or infinity, is left out too, and counts as a detected
attacker. A coordinate that no client sent is 0 and untouched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number
from fedsparse.federation.exchange.update import finite_rows

DENOMINATORS = ("senders", "participants")
_TOLERANCE = 1e-9
_FARTHEST = 1e100  # in units of a typical row: values are clamped to it, so that squares do not overflow
_CLOSE = 1e3  # in median distances: the geometric median starts from the mean of the rows within it
_CONVERGED = 1e-12  # in median distances: a shorter step ends the iteration
_PIECE = 1 << 16  # coordinates that are sorted at a time
_COMPARED = 1 << 12  # coordinates by which all pairs of rows are compared at a time: hundreds of rows stay in a cache
Averaged = tuple[Tensor, Tensor]


def weighted_mean(values: Tensor, sent: Tensor, weight: Tensor) -> Averaged:
    r"""Average over all rows, :math:`\sum_k w_k v_k / \sum_k w_k` (McMahan et al. 2017); unsent values are 0."""
    return coordinate_mean(values, sent, weight, "participants")


def coordinate_mean(values: Tensor, sent: Tensor, weight: Tensor, denominator: str = "senders") -> Averaged:
    """Average each coordinate over its senders, or over all participants.

    Args:
        values: (K, P).
        sent: bool (K, P).
        weight: (K,).
        denominator: ``senders`` or ``participants``; the latter takes unsent values as 0.

    Raises:
        ValueError: an unknown denominator.

    """
    check_choice("aggregation.denominator", denominator, *DENOMINATORS)
    values, sent, weight, _ = _counted(values, sent, weight)
    summed = (weight[:, None] * values).sum(0)
    senders = (weight[:, None] * sent).sum(0)
    touched = senders > 0
    divisor = senders if denominator == "senders" else weight.sum().expand_as(senders)
    return torch.where(touched, summed / torch.where(touched, divisor, 1.0), 0.0), touched


def trimmed_mean(values: Tensor, sent: Tensor, weight: Tensor, trim: float = 0.2) -> Averaged:
    """Average each coordinate over its m senders without the floor(trim * m) smallest and as many largest values.

    Unweighted (Yin et al. 2018).

    Raises:
        ValueError: a share outside [0, 0.5).

    """
    check_number("aggregation.average.trim", trim, least=0, below=0.5)
    values, sent, _, _ = _counted(values, sent, weight)
    senders = sent.sum(0)
    low = (trim * senders + _TOLERANCE).floor().long()
    return _middle(values, sent, low, senders - low), senders > 0


def median(values: Tensor, sent: Tensor, weight: Tensor) -> Averaged:
    """Take the median of each coordinate's senders, unweighted; the mean of the two middle ones of an even number."""
    values, sent, _, _ = _counted(values, sent, weight)
    senders = sent.sum(0)
    low = (senders - 1).clamp(min=0) // 2
    return _middle(values, sent, low, torch.maximum(senders - low, low + (senders > 0))), senders > 0


def _middle(values: Tensor, sent: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Average the sent values of each coordinate, in ascending order, from ``low`` to before ``high`` (P,)."""
    ordered = torch.where(sent, values, math.inf).sort(0).values
    rank = torch.arange(len(values), device=values.device)[:, None]
    taken = (rank >= low) & (rank < high)
    return torch.where(taken, ordered, 0.0).sum(0) / (high - low).clamp(min=1)


def krum(values: Tensor, sent: Tensor, weight: Tensor, attackers: int = 1, by: int | None = None) -> Averaged:
    """Pick the row nearest to its n - attackers - 2 nearest others, of n (Krum, Blanchard et al. 2017).

    Ties go to the lowest index. Lost rows are subtracted from ``attackers``.

    Args:
        values: (K, P).
        sent: bool (K, P).
        weight: (K,).
        attackers: number of rows that may be arbitrary.
        by: number of leading coordinates by which rows are compared; all by default.

    Raises:
        ValueError: fewer than attackers + 3 rows, lost ones included.

    """
    values, sent, weight, lost = _counted(values, sent, weight)
    order = _krum_order(values[:, :by], attackers, lost)
    if not len(order):
        return values.new_zeros(values.shape[1]), sent.any(0)
    return values[order[0]], sent[order[0]]


def multi_krum(
    values: Tensor,
    sent: Tensor,
    weight: Tensor,
    attackers: int = 1,
    keep: int | None = None,
    by: int | None = None,
) -> Averaged:
    """Average, by weight and over the senders, the rows that Krum ranks first (Blanchard et al. 2017).

    Args:
        values: (K, P).
        sent: bool (K, P).
        weight: (K,).
        attackers: number of rows that may be arbitrary.
        keep: number of rows that are averaged; all but ``attackers`` by default.
        by: as for ``krum``.

    Raises:
        ValueError: fewer than attackers + 3 rows, lost ones included.

    """
    values, sent, weight, lost = _counted(values, sent, weight)
    kept = len(values) - max(0, attackers - lost) if keep is None else keep
    best = _krum_order(values[:, :by], attackers, lost)[:kept]
    return coordinate_mean(values[best], sent[best], weight[best])


def _krum_order(values: Tensor, attackers: int, lost: int) -> Tensor:
    """Order rows by the sum of their squared distances to their nearest others, ties by index."""
    n, unknown = len(values), max(0, attackers - lost)
    if n + lost < attackers + 3:
        raise ValueError(f"{attackers} attackers need {attackers + 3} clients in a round; there are {n + lost}")
    if not n:
        return torch.zeros(0, dtype=torch.long)
    squares = _squared_distances(_scaled(values)[0])
    near = max(1, n - unknown - 2)  # at least one neighbour, also if more rows are lost than attackers assumed
    return squares.sort(1).values[:, :near].sum(1).argsort(stable=True)


def _squared_distances(rows: Tensor) -> Tensor:
    """Compute the squared distances of rows (K, P) to each other, (K, K), with infinity to themselves.

    By differences: a Gram matrix would take as long, and lose the distances of rows that are far from 0 beside them.
    """
    n = len(rows)
    squares = rows.new_full((n, n), math.inf)
    first, second = torch.triu_indices(n, n, 1, device=rows.device)
    pairs = sum(torch.pdist(part.contiguous()).square() for part in rows.split(_COMPARED, 1))
    squares[first, second] = squares[second, first] = pairs
    return squares


def geometric_median(
    values: Tensor, sent: Tensor, weight: Tensor, steps: int = 1000, smoothing: float = 1e-10
) -> Averaged:
    """Find the point with the least sum of weighted distances to the rows (RFA, Pillutla et al. 2022, algorithm 2).

    Start and tolerance are set by the median distance, so that the distance of attackers affects neither.

    Args:
        values: (K, P).
        sent: bool (K, P); unsent values are 0.
        weight: (K,).
        steps: largest number of Weiszfeld steps.
        smoothing: least distance, as a share of the rows' median distance from the coordinates' medians.

    Raises:
        ValueError: steps or smoothing out of range.

    """
    check_number("aggregation.average.steps", steps, whole=True, least=1)
    check_number("aggregation.average.smoothing", smoothing, above=0, below=1)
    values, sent, weight, _ = _counted(values, sent, weight)
    touched = sent.any(0)
    if not len(values):
        return values.new_zeros(values.shape[1]), touched
    values, unit = _scaled(values)
    centre = torch.cat([_weighted_median(part, weight) for part in values.split(_PIECE, 1)])
    away = (values - centre).norm(dim=1)
    scale = float(_weighted_median(away[:, None], weight))
    if scale == 0:  # rows with half of the weight are equal: they are the median
        return centre * unit, touched
    close = weight * (away <= _CLOSE * scale)
    point = (close[:, None] * values).sum(0) / close.sum()
    for _ in range(steps):
        share = weight / (values - point).norm(dim=1).clamp(min=smoothing * scale)
        before, point = point, (share[:, None] * values).sum(0) / share.sum()
        if float((point - before).norm()) <= _CONVERGED * scale:
            break
    return point * unit, touched


def _weighted_median(values: Tensor, weight: Tensor) -> Tensor:
    """Compute the weighted median of each column (K, P): the least value with half of the weight (K,) up to it."""
    ordered, order = values.sort(0)
    reached = weight[order].cumsum(0) >= weight.sum() / 2
    return ordered.gather(0, reached.int().argmax(0, keepdim=True)).squeeze(0)


def _scaled(values: Tensor) -> tuple[Tensor, float]:
    """Divide rows by a typical magnitude, a power of two, so that nothing is rounded: the rows and the unit."""
    if not values.numel():
        return values, 1.0
    middle = float(values.abs().amax(1).median())
    unit = math.ldexp(1.0, math.frexp(middle)[1] - 1) if middle > 0 else 1.0
    return (values / unit).clamp(-_FARTHEST, _FARTHEST), unit


def _counted(values: Tensor, sent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Select the finite rows of positive weight, in float64, with 0 at unsent values; and count the lost rows."""
    rows = weight > 0
    sent = sent[rows].bool()
    values = torch.where(sent, values[rows].double(), 0.0)
    good = [k for k, whole in enumerate(finite_rows(values)) if whole]
    lost = len(values) - len(good)
    return (
        (values[good], sent[good], weight[rows][good].double(), lost)
        if lost
        else (values, sent, weight[rows].double(), 0)
    )
