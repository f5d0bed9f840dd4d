"""Indices of the coordinates that train, by which they are gathered, stepped and written back.

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
LARGE = 1 << 16  # coordinates from which a tensor is a block of its own


@dataclass(frozen=True)
class Block:
    """A contiguous part of a row, which an optimizer steps as one tensor.

    Attributes:
        name: of the tensor; empty if the block is the whole row.
        start: its first coordinate in the row.
        shape: the tensor's shape, or (P,).
        mask: bool of this shape, or None where all of it trains.

    """

    name: str
    start: int
    shape: tuple[int, ...]
    mask: Tensor | None

    def of(self, row: Tensor) -> Tensor:
        """View the block in a row (P,), in its shape."""
        return row.narrow(0, self.start, math.prod(self.shape)).view(self.shape)


def blocks(space: ParamSpace, mask: Tensor, large: int = LARGE) -> list[Block]:
    """Split a row for an optimizer: a block for each large tensor that is not frozen, and one for all small tensors.

    The latter is the whole row, with a mask that is False in the large tensors.

    Args:
        space: the tensors of the row.
        mask: bool (P,), True where a coordinate trains.
        large: coordinates from which a tensor is a block of its own.

    """
    named = [Block(*tensor, None) for tensor in zip(space.names, space.offsets, space.shapes, strict=True)]
    apart = [block for block in named if math.prod(block.shape) >= large]
    trained = [_masked(block, block.of(mask)) for block in apart if bool(block.of(mask).any())]
    rest = mask.clone()
    for block in apart:
        block.of(rest).fill_(False)
    whole = Block("", 0, (space.size,), None if bool(rest.all()) else rest)
    return [*trained, *[whole] * bool(rest.any())]


def _masked(block: Block, mask: Tensor) -> Block:
    return block if bool(mask.all()) else replace(block, mask=mask)


def by_units(mask: Tensor) -> bool:
    """Whether a mask trains each index of the first dimension whole or not at all."""
    units = mask.reshape(len(mask), -1)
    return torch.equal(units.any(1), units.all(1))


@dataclass(frozen=True)
class TrainedIndex:
    """The index of the trained entries of a parameter: n of the N entries of one dimension, in at most two dimensions.

    Entries are output units (indices of the first dimension) if the mask trains these whole, coordinates of one row if
    it was expanded from one row to K, and coordinates of the flat parameter otherwise.

    Attributes:
        shape: in which the parameter's memory is viewed: (N,), (N, coordinates of a unit) or (K, N).
        dim: the dimension that ``positions`` count along.
        positions: int32 (n,), ascending; int64 where N needs it.

    """

    shape: tuple[int, ...]
    dim: int
    positions: Tensor

    @classmethod
    def of(cls, mask: Tensor, param: Tensor) -> TrainedIndex:
        """Build the index of a mask with the coarsest entries that train whole or not at all."""
        laid = mask if mask.stride() == param.stride() or _expanded(mask) else laid_like(mask, param)
        shape, dim, marks = _marks(laid, param)
        return cls(shape, dim, narrow(marks.nonzero().squeeze(1), shape[dim]).to(param.device))

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """Shape of gathered values: (n,), (n, coordinates of a unit) or (K, n)."""
        return tuple(len(self.positions) if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def numel(self) -> int:
        """Number of coordinates that train."""
        return math.prod(self.gathered)

    @cached_property
    def fingerprint(self) -> int:
        """CRC32 of the index, which differs between masks with the same number of trained coordinates."""
        return zlib.crc32(self.positions.cpu().numpy().tobytes(), hash((self.shape, self.dim)) & 0xFFFFFFFF)

    def see(self, tensor: Tensor) -> Tensor:
        """View a dense tensor's memory in this shape."""
        same = tensor.shape == self.shape and tensor.is_contiguous()
        return tensor if same else tensor.as_strided(self.shape, _strides(self.shape))

    def gather(self, tensor: Tensor) -> Tensor:
        """Copy the trained values of a tensor with the parameter's strides; the result has the shape ``gathered``."""
        return self.see(tensor).index_select(self.dim, self.positions)

    def scatter(self, values: Tensor, like: Tensor) -> Tensor:
        """Write gathered values into zeros with the shape and strides of ``like``."""
        out = torch.zeros_like(like)
        self.see(out).index_copy_(self.dim, self.positions.long(), values)
        return out

    def trained(
        self, param: Tensor, grad: Tensor, *moments: Moment, chunk: int = CHUNK
    ) -> Iterator[tuple[Tensor, Tensor, Sequence[Moment], Tensor]]:
        """Yield chunks of values, gradient, moments and positions; after each the values are written back.

        On a CPU a chunk has at most ``chunk`` coordinates, or is a single entry.
        """
        seen, gradient = self.see(param), self.see(grad if grad.stride() == param.stride() else laid_like(grad, param))
        for positions, parts in self._chunks(chunk, *moments):
            values = seen.index_select(self.dim, positions)
            yield values, gradient.index_select(self.dim, positions), parts, positions
            seen.index_copy_(self.dim, positions, values)

    def _chunks(self, chunk: int, *moments: Moment) -> Iterator[tuple[Tensor, Sequence[Moment]]]:
        """Yield chunks of positions and moments; positions are int64, as ``index_copy_`` needs them."""
        n, wide = len(self.positions), math.prod(self.shape) // max(1, self.shape[self.dim])
        size = max(1, chunk // wide) if self.positions.device.type == "cpu" else n
        if n <= size:
            yield self.positions.long(), moments
            return
        for low in range(0, n, size):
            length = min(size, n - low)
            positions = self.positions.narrow(0, low, length).long()
            yield positions, [None if m is None else m.narrow(self.dim, low, length) for m in moments]

    def by_client(self, values: Tensor, clients: int) -> Sequence[Tensor]:
        """Split gathered values by client, of whom each has an equal part of the first dimension: K views."""
        if self.dim == 1:
            return values.unbind(0)
        first = torch.arange(clients + 1, dtype=self.positions.dtype, device=self.positions.device) * (
            self.shape[0] // clients
        )
        return [values[low:high] for low, high in pairwise(torch.searchsorted(self.positions, first).tolist())]

    def of_clients(self, values: Tensor, positions: Tensor) -> Tensor:
        """Broadcast K numbers, one a client, to the gathered entries at ``positions``: (K, 1), (n,) or (n, 1)."""
        if self.dim == 1:
            return values.unsqueeze(1)
        found = values[positions // (self.shape[0] // len(values))]
        return found if len(self.shape) == 1 else found.unsqueeze(1)


def beside(
    value: float | Tensor, param: Tensor, index: TrainedIndex | None = None, positions: Tensor | None = None
) -> float | Tensor:
    """Broadcast K numbers (K,), one a client, to the rows of a parameter, or to its gathered entries at positions.

    A number, which is that of all clients, is returned.
    """
    if not isinstance(value, Tensor) or not value.dim():
        return value
    value = value.to(param.device)
    if index is None or positions is None:
        return value.view(-1, *[1] * (param.dim() - 1))
    return index.of_clients(value, positions)


def _marks(mask: Tensor, param: Tensor) -> tuple[tuple[int, ...], int, Tensor]:
    """Choose a view of a parameter: its shape, the dimension that is indexed, and a mask of that dimension."""
    if _expanded(mask):
        return (mask.shape[0], mask[0].numel()), 1, mask[0].reshape(-1)
    if mask.dim() > 1 and param.is_contiguous():
        units = mask.reshape(len(mask), -1)
        if by_units(mask):
            return tuple(units.shape), 0, units.any(1)
    return (mask.numel(),), 0, mask.as_strided((mask.numel(),), (1,))


def _expanded(mask: Tensor) -> bool:
    """Whether a mask was expanded from one contiguous row."""
    return mask.dim() > 1 and len(mask) > 1 and mask.stride(0) == 0 and mask[0].is_contiguous()


def laid_like(values: Tensor, param: Tensor) -> Tensor:
    """Copy values into memory with the parameter's strides."""
    return torch.empty_strided(param.shape, param.stride(), dtype=values.dtype, device=values.device).copy_(values)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) if len(shape) == 1 else (shape[1], 1)
