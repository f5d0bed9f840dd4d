"""Linearly interpolated quantiles of any number of scores, and what stands above one: nothing is sorted.

The value is that of ``numpy.quantile(method="linear")`` in float64; ``torch.quantile`` refuses more than 16,777,216.

Shapes: ``n`` scores, ``*`` any dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsparse.masks.topk import check, smallest


def quantile(parts: Sequence[Tensor], fraction: float) -> float:
    """Interpolate between the two scores around the place fraction * (n - 1) of the order, from 0.

    Args:
        parts: flat scores, counted together; n in all, NaN-free, at least one.
        fraction: in [0, 1].

    """
    lower, upper, weight = _around(parts, fraction)
    return _between(float(lower), float(upper), weight)


def above_quantile(scores: Tensor, fraction: float) -> Tensor:
    """Mark the scores strictly above the linearly interpolated quantile of all of them.

    No score lies between the two that the quantile is interpolated from, so the comparison is with one of them, in the
    scores' own dtype: nothing is rounded. A quantile between a finite score and infinity is infinite.

    Args:
        scores: (*), floating point.
        fraction: the share that lies below, in [0, 1]; with ties fewer scores may stand above than 1 - fraction.

    Returns:
        bool, of the shape of ``scores``.

    Raises:
        ValueError: a fraction outside [0, 1], scores without a dimension, or NaN among them.

    >>> above_quantile(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5)
    tensor([False, False,  True,  True])
    >>> above_quantile(torch.tensor([1.0, 2.0, 2.0]), 0.5)
    tensor([False, False, False])

    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of scores below the quantile must lie in [0, 1], not {fraction!r}")
    check(scores)
    scores = scores.detach()
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    lower, upper, weight = _around([scores.reshape(-1)], fraction)
    reached = _between(float(lower), float(upper), weight) >= float(upper)
    return scores > (upper if reached else lower)


def _around(parts: Sequence[Tensor], fraction: float) -> tuple[Tensor, Tensor, float]:
    """Find the two scores around a place of the order, and how far it is from the lower to the upper one."""
    place = fraction * (sum(part.numel() for part in parts) - 1)
    below = math.floor(place)
    lower = smallest(parts, below + 1)
    return lower, smallest(parts, below + 2) if place > below else lower, place - below


def _between(lower: float, upper: float, weight: float) -> float:
    """Interpolate as numpy does, from the nearer end; next to an infinite score the other end has no say."""
    if weight == 0 or lower == upper or math.isinf(lower):
        return lower
    if math.isinf(upper):
        return upper
    step = upper - lower
    if math.isinf(step):  # beyond float64
        return lower * (1 - weight) + upper * weight
    return lower + step * weight if weight < 0.5 else upper - step * (1 - weight)
