"""The points of a surface: all of them, or few and a spline through these.

Shapes: A and B points of the axes, M points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsparse.landscape.refinement import refine
from fedsparse.landscape.store import Store, numbers
from fedsparse.landscape.surface import Evaluated


class Values(NamedTuple):
    """Values of a surface.

    Attributes:
        loss: float64 (A, B).
        accuracy: float64 (A, B).
        errors: largest error of loss and accuracy at held-out points, as a part of their range (2,); 0 where every
            point was evaluated.
        evaluated: points.

    """

    loss: np.ndarray
    accuracy: np.ndarray
    errors: np.ndarray
    evaluated: int


@dataclass(frozen=True)
class Grid:
    """A grid of points whose values are appended to a partial file.

    Attributes:
        store: writes the partial file.
        name: of the surface.
        key: of the surface.
        a: coordinates of the first axis (A,).
        b: of the second axis (B,).
        evaluate: evaluates points (M,), (M,) chunk by chunk.

    """

    store: Store
    name: str
    key: str
    a: Tensor
    b: Tensor
    evaluate: Callable[[Tensor, Tensor], Iterable[Evaluated]]

    def whole(self) -> Values:
        """Evaluate every point."""
        first, second = (grid.reshape(-1) for grid in torch.meshgrid(self.a, self.b, indexing="ij"))
        found = self._values(self.name, first, second)
        loss, accuracy = (numbers(part.view(len(self.a), len(self.b))) for part in found)
        return Values(loss, accuracy, np.zeros(2), loss.size)

    def refined(self, tolerance: float, generator: np.random.Generator) -> Values:
        """Evaluate few points, and a spline through them: see ``refine``. A is B.

        Args:
            tolerance: largest error of the loss.
            generator: draws the held-out points.

        """
        calls = count()

        def values(u: np.ndarray, v: np.ndarray) -> np.ndarray:
            """Evaluate points of the square from -1 to 1."""
            ends = ((axis[0], axis[-1]) for axis in (self.a, self.b))
            units = (torch.from_numpy(np.ascontiguousarray(unit)) for unit in (u, v))
            at = (low + (unit + 1) / 2 * (high - low) for (low, high), unit in zip(ends, units, strict=True))
            return np.stack([numbers(part) for part in self._values(f"{self.name}.{next(calls)}", *at)], 1)

        found = refine(values, grid=len(self.a), generator=generator, tolerance=tolerance)
        loss, accuracy = np.moveaxis(found.values, 2, 0)
        return Values(loss, np.clip(accuracy, 0, 1), found.errors, found.evaluated)

    def _values(self, name: str, first: Tensor, second: Tensor) -> Evaluated:
        """Evaluate points (M,), (M,), but for those of the partial file."""
        return self.store.points(name, self.key, len(first), lambda done: self.evaluate(first[done:], second[done:]))
