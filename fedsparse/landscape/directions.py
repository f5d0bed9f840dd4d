"""Directions and planes through models, on which losses are drawn.

Shapes: P coordinates of the space, M points, R models or rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsparse.core.checks import check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import CHUNK

COLLINEAR = 1e-5  # of a difference's norm: float32 rows differ from a line by about 1e-7 of it


@torch.no_grad()
def filter_normalise(direction: Tensor, row: Tensor, space: ParamSpace, mask: Tensor | None = None) -> Tensor:
    """Scale each filter of a direction to the norm of the row's filter (Li et al. 2018, section 4).

    A filter is a row of a tensor of two or more dimensions. Biases and other tensors of fewer dimensions do not move: a
    ReLU network is the same function when a filter is multiplied by 10 and the next layer divided by 10, and then its
    normalised surface is the same too.

    Args:
        direction: (P,).
        row: the weights (P,).
        space: which tensor each coordinate belongs to.
        mask: bool (P,); both norms are over the coordinates where it is True, and the others do not move.

    Returns:
        (P,), in the dtype of the row.

    """
    scaled, inside = torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool) if mask is None else mask
    parts = (space.unflatten(t) for t in (scaled, direction, row, inside.to(row.device)))
    for into, drawn, weight, marks in zip(*(part.values() for part in parts), strict=True):
        if weight.dim() >= 2:
            d, w = ((t.double() * marks).flatten(1) for t in (drawn, weight))
            norm = torch.linalg.vector_norm(d, dim=1, keepdim=True)
            factor = torch.linalg.vector_norm(w, dim=1, keepdim=True) / norm
            into.copy_((d * torch.where(norm > 0, factor, 0.0)).view_as(into))
    return scaled


def random_direction(row: Tensor, space: ParamSpace, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """Draw a filter-normalised direction (P,) of normal coordinates; arguments as in ``filter_normalise``."""
    drawn = torch.randn(len(row), generator=generator, dtype=row.dtype)  # on the CPU: the same on every device
    return filter_normalise(drawn.to(row.device), row, space, mask)


@dataclass(frozen=True)
class Plane:
    """The points origin + a * first + b * second.

    Attributes:
        origin: (P,), the point (0, 0).
        first: direction (P,).
        second: direction (P,), not parallel to the first.
        shares: of a trajectory's variance along either direction; empty for planes of another kind.

    """

    origin: Tensor
    first: Tensor
    second: Tensor
    shares: tuple[float, ...] = ()

    @classmethod
    def random(cls, row: Tensor, space: ParamSpace, generator: torch.Generator, mask: Tensor | None = None) -> Plane:
        """Lay a plane through a model along two random filter-normalised directions.

        Args:
            row: the model (P,), the origin.
            space: which tensor each coordinate belongs to.
            generator: draws the directions, on the CPU.
            mask: bool (P,), what moves; by default everything.

        Raises:
            ValueError: the directions do not span a plane, since at most one coordinate of a filter moves.

        """
        first, second = (random_direction(row, space, generator, mask) for _ in range(2))
        if not _spanned(first, second):
            raise ValueError("random directions span no plane: too few coordinates of weights lie inside the mask")
        return cls(row, first, second)

    @classmethod
    def through(cls, rows: Tensor, mask: Tensor | None = None) -> Plane:
        """Lay a plane through three models by Gram-Schmidt; both directions have the length of the first difference.

        So distances on a picture are distances of models, and the second model is the point (1, 0).

        Args:
            rows: the models (3, P); the first is the origin.
            mask: bool (P,), what moves; a model that differs elsewhere lies off the plane.

        Raises:
            ValueError: not three rows, or collinear ones.

        """
        if len(rows) != 3:
            raise ValueError(f"a plane goes through 3 models, not {len(rows)}")
        first, other = (rows[1:] - rows[0]).double()
        if mask is not None:
            first, other = (way * mask.to(way.device) for way in (first, other))
        if not _spanned(first, other):
            raise ValueError("the three models are collinear: they span no plane")
        across = other - first * (first @ other / first.square().sum())
        second = across * (first.norm() / across.norm())
        return cls(rows[0], first.to(rows.dtype), second.to(rows.dtype))

    @classmethod
    def pca(cls, rows: Tensor, *, chunk: int = CHUNK) -> Plane:
        """Lay a plane along the first two principal components of a trajectory, through its last row.

        The components, of length 1, are combinations of the centred rows by eigenvectors of their R x R Gram matrix,
        so that no P x P matrix is made.

        Args:
            rows: (R, P), the model after each round.
            chunk: coordinates at once: a float64 copy of all rows would take twice their memory.

        Raises:
            ValueError: fewer than three rows, collinear ones, or a chunk of no coordinate.

        """
        check_whole("chunk", chunk, 1)
        if len(rows) < 3:
            raise ValueError(f"PCA of a trajectory needs the rows of 3 rounds or more, not {len(rows)}")
        mean = rows.mean(0, dtype=torch.float64)
        chunks = [slice(start, start + chunk) for start in range(0, rows.shape[1], chunk)]
        gram = sum(((part := _centred(rows, mean, at)) @ part.T for at in chunks), torch.zeros(()))
        values, vectors = torch.linalg.eigh(gram)
        top, by = values[-2:].flip(0), vectors[:, -2:].flip(1)
        if not float(top[1]) > COLLINEAR**2 * float(top[0]):
            raise ValueError("the trajectory is collinear: its rows span no plane")
        by = by * by.gather(0, by.abs().argmax(0, keepdim=True)).sign()  # eigenvectors have no sign of their own
        found = torch.cat([by.T @ _centred(rows, mean, at) for at in chunks], 1) / top.sqrt().unsqueeze(1)
        first, second = found.to(rows.dtype)
        return cls(rows[-1], first, second, tuple((top / values.clamp(min=0).sum()).tolist()))

    def point(self, a: Tensor, b: Tensor) -> Tensor:
        """Points at coordinates (M,), (M,): rows (M, P)."""
        a, b = (t.to(self.origin).unsqueeze(1) for t in (a, b))
        return torch.addcmul(torch.addcmul(self.origin, a, self.first), b, self.second)

    def coordinates(self, rows: Tensor) -> Tensor:
        """Project rows (M, P) onto the plane: float64 (M, 2), by least squares, as directions may be oblique."""
        basis = self._basis()
        gram = basis @ basis.T
        return torch.stack([torch.linalg.solve(gram, basis @ (row.double() - self.origin.double())) for row in rows])

    def distance(self, rows: Tensor) -> Tensor:
        """Distances of rows (M, P) from the plane: float64 (M,). A surface is the loss of points on it alone."""
        basis, at = self._basis(), self.coordinates(rows)
        off = (row.double() - self.origin.double() - c @ basis for row, c in zip(rows, at, strict=True))
        return torch.stack([torch.linalg.vector_norm(rest) for rest in off])

    def _basis(self) -> Tensor:
        """Both directions, float64 (2, P)."""
        return torch.stack([self.first, self.second]).double()


def _spanned(first: Tensor, second: Tensor) -> bool:
    """Whether two vectors (P,) span a plane, beyond rounding; a zero makes NaN, which is not above the bound."""
    a, b = (vector.double() / torch.linalg.vector_norm(vector.double()) for vector in (first, second))
    return bool((b - a * (a @ b)).norm() > COLLINEAR)


def _centred(rows: Tensor, mean: Tensor, at: slice) -> Tensor:
    """Differences of rows from their mean, float64, of some coordinates."""
    return rows[:, at].double() - mean[at]
