"""Values as bytes: in their own dtype, in half precision, or as 8-bit steps of each block's largest magnitude."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = {0: torch.float32, 1: torch.float64, 2: torch.float16, 3: torch.bfloat16, 4: torch.int8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 256  # 8-bit values that share a float32 scale
UNFIT = "8-bit values cannot hold NaN, infinities or numbers beyond float32; send these as they are"
_STEPS = 127
_LARGEST = float(np.nextafter(np.finfo(np.float32).max, np.float32(0)))  # 127 steps of the largest float32 overflow


def values_size(dtype: torch.dtype, count: int) -> int:
    """Compute the bytes of so many values on the wire."""
    return count * dtype.itemsize + (4 * -(-count // BLOCK) if dtype == torch.int8 else 0)


def write_values(values: Tensor, dtype: torch.dtype) -> bytes:
    """Encode values (k,) in a dtype; numbers beyond the range of a half become its largest number.

    Raises:
        ValueError: NaN or infinity as 8-bit values.

    """
    values = values.detach().cpu()
    if dtype != torch.int8:
        return raw(_halved(values, dtype))
    if not values.float().isfinite().all():
        raise ValueError(UNFIT)
    scales, steps = _steps(values)
    return raw(scales) + steps.view(-1)[: len(values)].numpy().tobytes()


def as_read(values: Tensor, sent: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round values as writing and reading them would, where they are; the host does not wait for their device.

    Args:
        values: (n,), of which those that are sent are written one after the other.
        sent: bool (n,); None if all are sent.
        dtype: on the wire.

    Returns:
        Values (n,) as they are read, in their own dtype, of no meaning where not sent; and whether the dtype can hold
        those that are sent, a bool scalar: 8-bit steps hold neither NaN nor infinities, and writing them is an error.

    """
    if dtype != torch.int8:
        return _halved(values, dtype).to(values.dtype), torch.ones((), dtype=torch.bool, device=values.device)
    if sent is None:
        return _stepped(values)
    if values.device.type == "cpu":  # where the host need not wait to know how many are sent
        read, fits = _stepped(values[sent])
        return torch.zeros_like(values).masked_scatter_(sent, read), fits
    places = torch.where(sent, sent.cumsum(0) - 1, len(sent))  # among those that are sent; n for all others
    read, fits = _stepped(values.new_zeros(len(values) + 1).scatter_(0, places, values)[:-1])
    return read[places.clamp(max=len(values) - 1)], fits


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


def _halved(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert values to a dtype; numbers beyond the range of a half become its largest number."""
    if dtype == values.dtype:
        return values
    limit, halves = torch.finfo(dtype).max, values.to(dtype)
    return torch.where(halves.isinf() & values.isfinite(), halves.clamp(-limit, limit), halves)


def _steps(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round values (k,) to steps: float32 scales of the blocks (B,), and int8 steps (B, BLOCK), padded with zeros."""
    blocks = torch.nn.functional.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    blocks = blocks.clamp(-_LARGEST, _LARGEST)
    largest = blocks.abs().amax(1)
    scales = largest / torch.full_like(largest, _STEPS)  # a GPU multiplies by the inverse of a number, which rounds
    steps = (blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(1)).round()
    return scales, steps.clamp(-_STEPS, _STEPS).to(torch.int8)


def _stepped(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round values (k,) to 8-bit steps and back; and whether all of them are finite in float32, a bool scalar."""
    scales, steps = _steps(values)
    read = (steps * scales.unsqueeze(1)).view(-1)[: len(values)]
    return read.to(values.dtype), values.float().isfinite().all()


def _read_steps(data: npt.NDArray[np.uint8], count: int, start: int, stop: int) -> Tensor:
    """Multiply steps by the scales of their blocks: float32 (stop - start,)."""
    scales_end = 4 * -(-count // BLOCK)
    first = start // BLOCK
    scales = data[4 * first : 4 * -(-stop // BLOCK)].view("<f4").repeat(BLOCK)[start - first * BLOCK :]
    steps = data[scales_end + start : scales_end + stop].view(np.int8)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be NaN, infinite or too large
        return torch.from_numpy(steps * scales[: len(steps)])
