"""A surface by a cubic spline through few of its points, with its error at points that the spline did not see.

Shapes: M points, C values of each (loss, accuracy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import RectBivariateSpline

from fedsparse.core.checks import check_positive, check_whole

Values = Callable[[np.ndarray, np.ndarray], np.ndarray]
HELD_OUT = 40


@dataclass(frozen=True)
class Refined:
    """A surface on a fine grid.

    Attributes:
        axis: coordinates (n,) of the grid, the same along both directions.
        values: (n, n, C), the first direction first.
        errors: largest error at held-out points, as a part of each value's range (C,); 0 where every point of the grid
            was evaluated.
        coarse: points along a side of the grid that was evaluated.
        evaluated: points evaluated in all, the held-out ones included.

    """

    axis: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    coarse: int
    evaluated: int


def refine(
    evaluate: Values,
    reach: tuple[float, float] = (-1.0, 1.0),
    grid: int = 51,
    *,
    generator: np.random.Generator,
    coarse: int = 11,
    tolerance: float = 0.01,
    held_out: int = HELD_OUT,
) -> Refined:
    """Evaluate a coarse grid, and a finer one until its spline errs no more than the tolerance in the first value.

    Each grid halves the distances of the one before, whose points it keeps. Where that would be no coarser than the
    fine grid, or a point is not finite, which no spline goes through, the fine grid itself is evaluated.

    Args:
        evaluate: values (M, C) of points (M,), (M,).
        reach: ends of both axes.
        grid: n, points along a side of the fine grid.
        generator: draws the held-out points.
        coarse: points along a side of the first grid, at least 4, as a cubic spline needs.
        tolerance: largest error, as a part of the range.
        held_out: points, drawn evenly, at which the error is measured.

    Raises:
        ValueError: a number out of its range.

    """
    check_whole("grid", grid, 3)
    check_whole("coarse", coarse, 4)
    check_positive("tolerance", tolerance)
    check_whole("held_out", held_out, 1)
    fine, seen, known = np.linspace(*reach, grid), 0, None
    if coarse < grid:
        apart, seen = generator.uniform(*reach, (2, held_out)), held_out
        expected = evaluate(*apart)
    while coarse < grid:
        axis = np.linspace(*reach, coarse)
        known, seen = _grown(evaluate, axis, known), held_out + coarse**2
        if not (np.isfinite(known).all() and np.isfinite(expected).all()):
            break
        splines = [RectBivariateSpline(axis, axis, values) for values in np.moveaxis(known, 2, 0)]
        guessed = np.stack([spline.ev(*apart) for spline in splines], 1)
        span = np.ptp(np.concatenate([known.reshape(coarse**2, -1), expected]), axis=0)
        errors = np.abs(guessed - expected).max(0) / np.where(span > 0, span, 1)
        if errors[0] <= tolerance:
            values = np.stack([spline(fine, fine) for spline in splines], 2)
            return Refined(fine, values, errors, coarse, seen)
        coarse = 2 * coarse - 1
    values = _grown(evaluate, fine, None)
    return Refined(fine, values, np.zeros(values.shape[2]), grid, seen + grid**2)


def _grown(evaluate: Values, axis: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Evaluate a grid (n, n, C), but for every second row and column where these are known."""
    new = np.ones((len(axis), len(axis)), dtype=bool)
    if known is not None:
        new[::2, ::2] = False
    at = np.nonzero(new)
    found = evaluate(axis[at[0]], axis[at[1]])
    values = np.empty((*new.shape, found.shape[1]))
    values[new] = found
    if known is not None:
        values[::2, ::2] = known
    return values
