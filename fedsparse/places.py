"""Where a mask lets a tensor train, as an index: what trains can be gathered, stepped and written back by itself.

Shapes: N entries of a dimension, n of them train; K clients of a cohort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 17  # coordinates at once on a CPU: they stay in its cache, and values and a long index need no second row


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
        narrow = torch.int32 if shape[dim] < 1 << 31 else torch.int64
        return cls(shape, dim, marks.nonzero().squeeze(1).to(param.device, narrow))

    @property
    def numel(self) -> int:
        """Coordinates that train."""
        return len(self.index) * math.prod(self.shape) // self.shape[self.dim]

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

    def chunks(self, buffer: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Split index and momentum for one pass over them; the index comes as int64, which torch writes by."""
        n, wide = len(self.index), math.prod(self.shape) // max(1, self.shape[self.dim])
        size = max(1, _CHUNK // wide) if self.index.device.type == "cpu" else n
        if n <= size:
            yield self.index.long(), buffer
            return
        for low in range(0, n, size):
            length = min(size, n - low)
            index = self.index.narrow(0, low, length).long()
            yield index, None if buffer is None else buffer.narrow(self.dim, low, length)


def _marks(mask: Tensor, param: Tensor) -> tuple[tuple[int, ...], int, Tensor]:
    """Say how to see a parameter, which dimension the mask is about, and which of its entries train."""
    if _expanded(mask):
        return (mask.shape[0], mask[0].numel()), 1, mask[0].reshape(-1)
    if mask.dim() > 1 and param.is_contiguous():
        units = mask.reshape(len(mask), -1)
        if torch.equal(units.any(1), units.all(1)):
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
