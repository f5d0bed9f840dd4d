"""Lines between models, and the barriers on them.

Shapes: P coordinates of the space, M points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def between(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """Points on the line from ``start`` (P,) to ``end`` (P,), at fractions (M,) of the way: rows (M, P).

    At 0 and 1 they are the two models to the bit; fractions outside [0, 1] lie beyond them.
    """
    return torch.lerp(start, end, at.to(start).unsqueeze(1))


class Barrier(NamedTuple):
    """What stands between two models; one figure alone misleads.

    Attributes:
        above_chord: the largest rise above the straight line between the two ends' values (Frankle et al. 2020).
        above_worse_end: the largest rise above the worse of the two ends; 0 where no point is worse.
        worst: the worst value on the line.

    """

    above_chord: float
    above_worse_end: float
    worst: float


def barrier(values: Tensor, at: Tensor | None = None, higher_is_better: bool = False) -> Barrier:
    """Measure the barrier on a line between two models.

    Args:
        values: loss or accuracy (M,) of the points, the ends included; NaN is a gap. NaN at an end leaves no chord: its
            figures are NaN.
        at: fractions (M,) of the way, rising from 0 to 1; evenly spaced by default.
        higher_is_better: for accuracy; a rise is then a fall, and the worst value the lowest.

    Raises:
        ValueError: fewer than two points, or so many fractions as there are no values.

    >>> barrier(torch.tensor([1.0, 4.0, 2.0]))
    Barrier(above_chord=2.5, above_worse_end=2.0, worst=4.0)
    """
    if len(values) < 2 or (at is not None and len(at) != len(values)):
        raise ValueError(f"a barrier needs the values of 2 points or more and as many fractions, not {len(values)}")
    losses = -values.double() if higher_is_better else values.double()
    way = torch.linspace(0, 1, len(values), dtype=torch.float64) if at is None else at.double().cpu()
    chord = torch.lerp(losses[0], losses[-1], way.to(losses))
    worst = _highest(losses)
    above_worse_end = worst - float(torch.maximum(losses[0], losses[-1]))
    return Barrier(_highest(losses - chord), above_worse_end, 0.0 - worst if higher_is_better else worst)


def _highest(values: Tensor) -> float:
    """Largest of some values but for gaps; NaN if there are gaps alone."""
    present = values[~values.isnan()]
    return float(present.max()) if len(present) else float("nan")
