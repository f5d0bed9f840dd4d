"""Where a mask lets a tensor train, as an index: what trains can be gathered, stepped and written back by itself.

Shapes: P coordinates of the space, n of them train; N entries of a dimension; K clients of a cohort, * any dimensions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import CHUNK, narrow

Moment = TypeVar("Moment", Tensor, Tensor | None)
LARGE = 1 << 16  # coordinates of a tensor that is worth a step of its own


@dataclass(frozen=True)
class Piece:
    """A stretch of a row with one kind of mask.

    Attributes:
        name: the tensor's, or empty for a piece of the whole row.
        start: its first coordinate.
        shape: the tensor's shape, or (P,).
        mask: bool of this shape, or None where all of it trains.

    """

    name: str
    start: int
    shape: tuple[int, ...]
    mask: Tensor | None

    def of(self, row: Tensor) -> Tensor:
        """View the piece of a row (P,)."""
        return row.narrow(0, self.start, math.prod(self.shape)).view(self.shape)


def pieces(space: ParamSpace, mask: Tensor, large: int = LARGE) -> list[Piece]:
    """Split a row for an optimizer: each large tensor apart, unless it is frozen; all small ones are one piece.

    That piece is the whole row; its mask is False where another piece trains.

    Args:
        space: the tensors of the row.
        mask: bool (P,), True where a coordinate trains.
        large: coordinates from which a tensor is stepped apart.

    """
    named = [Piece(*tensor, None) for tensor in zip(space.names, space.offsets, space.shapes, strict=True)]
    apart = [piece for piece in named if math.prod(piece.shape) >= large]
    trained = [_masked(piece, piece.of(mask)) for piece in apart if bool(piece.of(mask).any())]
    rest = mask.clone()
    for piece in apart:
        piece.of(rest).fill_(False)
    whole = Piece("", 0, (space.size,), None if bool(rest.all()) else rest)
    return [*trained, *[whole] * bool(rest.any())]


def _masked(piece: Piece, mask: Tensor) -> Piece:
    return piece if bool(mask.all()) else replace(piece, mask=mask)


def by_units(mask: Tensor) -> bool:
    """Whether every index of the first dimension trains whole or not at all."""
    units = mask.reshape(len(mask), -1)
    return torch.equal(units.any(1), units.all(1))


@dataclass(frozen=True)
class Place:
    """Where a mask lets a parameter train: n of the N entries of one dimension of it, seen in a shape of two at most.

    Single coordinates are entries of the flat parameter. Where a mask lets whole output units train (an index of the
    first dimension), the units are; where it was expanded from one row to K, the coordinates of that row.

    Attributes:
        shape: how the parameter's memory is seen: (N,), (N, coordinates of a unit) or (K, N).
        dim: the dimension that ``index`` is about.
        index: int32 (n,), ascending; int64 where N needs it.

    """

    shape: tuple[int, ...]
    dim: int
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor, param: Tensor) -> Place:
        """Find the coarsest entries that the mask does not cut."""
        laid = mask if mask.stride() == param.stride() or _expanded(mask) else laid_like(mask, param)
        shape, dim, marks = _marks(laid, param)
        return cls(shape, dim, narrow(marks.nonzero().squeeze(1), shape[dim]).to(param.device))

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """Shape of what trains: (n,), (n, coordinates of a unit) or (K, n)."""
        return tuple(len(self.index) if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def numel(self) -> int:
        """Coordinates that train."""
        return math.prod(self.gathered)

    @cached_property
    def fingerprint(self) -> int:
        """Tell one mask of a parameter from another with as many ones."""
        return zlib.crc32(self.index.cpu().numpy().tobytes(), hash((self.shape, self.dim)) & 0xFFFFFFFF)

    def see(self, tensor: Tensor) -> Tensor:
        """View a dense tensor's memory in this shape."""
        same = tensor.shape == self.shape and tensor.is_contiguous()
        return tensor if same else tensor.as_strided(self.shape, _strides(self.shape))

    def gather(self, tensor: Tensor) -> Tensor:
        """Copy what trains of a tensor that lies like the parameter: (n,), (n, coordinates of a unit) or (K, n)."""
        return self.see(tensor).index_select(self.dim, self.index)

    def scatter(self, values: Tensor, like: Tensor) -> Tensor:
        """Write gathered values into zeros that lie like a parameter."""
        out = torch.zeros_like(like)
        self.see(out).index_copy_(self.dim, self.index.long(), values)
        return out

    def trained(
        self, param: Tensor, grad: Tensor, *moments: Moment, chunk: int = CHUNK
    ) -> Iterator[tuple[Tensor, Tensor, Sequence[Moment], Tensor]]:
        """Give what trains a chunk after the other: values, gradient, moments, index; the values are written back.

        On a CPU a chunk has at most so many coordinates, or is a single entry.
        """
        seen, steep = self.see(param), self.see(grad if grad.stride() == param.stride() else laid_like(grad, param))
        for index, parts in self._chunks(chunk, *moments):
            values = seen.index_select(self.dim, index)
            yield values, steep.index_select(self.dim, index), parts, index
            seen.index_copy_(self.dim, index, values)

    def _chunks(self, chunk: int, *moments: Moment) -> Iterator[tuple[Tensor, Sequence[Moment]]]:
        """Split index and moments for one pass over them; the index comes as int64, which torch writes by."""
        n, wide = len(self.index), math.prod(self.shape) // max(1, self.shape[self.dim])
        size = max(1, chunk // wide) if self.index.device.type == "cpu" else n
        if n <= size:
            yield self.index.long(), moments
            return
        for low in range(0, n, size):
            length = min(size, n - low)
            index = self.index.narrow(0, low, length).long()
            yield index, [None if m is None else m.narrow(self.dim, low, length) for m in moments]

    def by_client(self, values: Tensor, clients: int) -> Sequence[Tensor]:
        """View gathered values as what is each client's, who are the parameter's first dimension: K tensors."""
        if self.dim == 1:
            return values.unbind(0)
        first = torch.arange(clients + 1, dtype=self.index.dtype, device=self.index.device) * (self.shape[0] // clients)
        return [values[low:high] for low, high in pairwise(torch.searchsorted(self.index, first).tolist())]

    def of_clients(self, values: Tensor, index: Tensor) -> Tensor:
        """Lay K numbers, one of each client, beside the gathered entries of ``index``: (K, 1), (n,) or (n, 1)."""
        if self.dim == 1:
            return values.unsqueeze(1)
        found = values[index // (self.shape[0] // len(values))]
        return found if len(self.shape) == 1 else found.unsqueeze(1)


def _marks(mask: Tensor, param: Tensor) -> tuple[tuple[int, ...], int, Tensor]:
    """Say how to see a parameter, which dimension the mask is about, and which of its entries train."""
    if _expanded(mask):
        return (mask.shape[0], mask[0].numel()), 1, mask[0].reshape(-1)
    if mask.dim() > 1 and param.is_contiguous():
        units = mask.reshape(len(mask), -1)
        if by_units(mask):
            return tuple(units.shape), 0, units.any(1)
    return (mask.numel(),), 0, mask.as_strided((mask.numel(),), (1,))


def _expanded(mask: Tensor) -> bool:
    """Whether one row stands for all of them, and is dense."""
    return mask.dim() > 1 and len(mask) > 1 and mask.stride(0) == 0 and mask[0].is_contiguous()


def laid_like(values: Tensor, param: Tensor) -> Tensor:
    """Copy values so that they lie in memory as the parameter does."""
    return torch.empty_strided(param.shape, param.stride(), dtype=values.dtype, device=values.device).copy_(values)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) if len(shape) == 1 else (shape[1], 1)
