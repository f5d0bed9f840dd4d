"""Values as bytes: in their own dtype, in half precision, or as 8-bit steps of each block's largest magnitude."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = {0: torch.float32, 1: torch.float64, 2: torch.float16, 3: torch.bfloat16, 4: torch.int8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 256  # 8-bit values that share a float32 scale
_STEPS = 127
_LARGEST = np.nextafter(np.finfo(np.float32).max, np.float32(0))  # 127 steps of the largest float32 itself overflow


def values_size(dtype: torch.dtype, count: int) -> int:
    """Compute the bytes of so many values on the wire."""
    return count * dtype.itemsize + (4 * -(-count // BLOCK) if dtype == torch.int8 else 0)


def write_values(values: Tensor, dtype: torch.dtype) -> bytes:
    """Encode values (k,) in a dtype; numbers beyond the range of a half become its largest number.

    Raises:
        ValueError: NaN or infinity as 8-bit values.

    """
    values = values.detach().cpu()
    if dtype == torch.int8:
        return _write_steps(values.to(torch.float32).numpy())
    if dtype != values.dtype:
        limit, source = torch.finfo(dtype).max, values
        values = source.to(dtype)
        values = torch.where(values.isinf() & source.isfinite(), values.clamp(-limit, limit), values)
    return raw(values)


def read_values(
    data: npt.NDArray[np.uint8], dtype: torch.dtype, count: int, out: torch.dtype, piece: slice = slice(None)
) -> Tensor:
    """Decode a piece of ``count`` values to the dtype ``out``."""
    start, stop, _ = piece.indices(count)
    if start == stop:
        return torch.zeros(0, dtype=out)
    if dtype == torch.int8:
        return _read_steps(data, count, start, stop).to(out)
    return torch.from_numpy(data[start * dtype.itemsize : stop * dtype.itemsize].copy()).view(dtype).to(out)


def raw(values: Tensor) -> bytes:
    """Copy a tensor's memory."""
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _write_steps(values: npt.NDArray[np.float32]) -> bytes:
    """Encode the blocks' float32 scales, then the steps, rounded to the nearest."""
    if not np.isfinite(values).all():
        raise ValueError("8-bit values cannot hold NaN, infinities or numbers beyond float32; send these as they are")
    blocks = np.zeros((-(-len(values) // BLOCK), BLOCK), dtype=np.float32)
    blocks.reshape(-1)[: len(values)] = values.clip(-_LARGEST, _LARGEST)
    scales = np.abs(blocks).max(1, initial=0.0) / np.float32(_STEPS)
    steps = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).clip(-_STEPS, _STEPS).astype(np.int8)
    return scales.astype("<f4").tobytes() + steps.reshape(-1)[: len(values)].tobytes()


def _read_steps(data: npt.NDArray[np.uint8], count: int, start: int, stop: int) -> Tensor:
    """Multiply steps by the scales of their blocks: float32 (stop - start,)."""
    scales_end = 4 * -(-count // BLOCK)
    first = start // BLOCK
    scales = data[4 * first : 4 * -(-stop // BLOCK)].view("<f4").repeat(BLOCK)[start - first * BLOCK :]
    steps = data[scales_end + start : scales_end + stop].view(np.int8)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be NaN, infinite or too large
        return torch.from_numpy(steps * scales[: len(steps)])
