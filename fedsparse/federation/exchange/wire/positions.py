"""Positions of sent values as bytes: the cheapest of none, a bitmap, flat 32-bit indices and varint gaps.

Shapes: n coordinates, in the same order on both sides, k of them sent.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
_SHIFTS = (7, 14, 21, 28)  # a gap of 2 ** 7 or more takes a second byte, and so on


class Coding(IntEnum):
    """How positions are written; the numbers are part of the wire format."""

    ALL = 0  # everything is sent: no positions
    BITMAP = 1  # one bit a coordinate, least significant first
    FLAT = 2  # uint32 for each value, little-endian
    GAPS = 3  # coordinates skipped before each value, seven bits a byte (LEB128)


def write_positions(sent: Bools) -> tuple[Coding, bytes]:
    """Write bool (n,) in the coding that takes the fewest bytes.

    >>> write_positions(np.array([True, False, False, False, False, False, True]))
    (<Coding.BITMAP: 1>, b'A')
    """
    coding, _, gaps = _cheapest(sent)
    if coding == Coding.ALL:
        return coding, b""
    if coding == Coding.GAPS:
        return coding, _write_gaps(gaps)
    return coding, write_bitmap(sent) if coding == Coding.BITMAP else np.flatnonzero(sent).astype("<u4").tobytes()


def positions_size(sent: Tensor) -> Tensor:
    """Count the bytes of ``write_positions`` where the marks are: bool (n,) -> int64 scalar, which no host waits for.

    A gap takes ``2 ** bits`` coordinates or more if as many unsent ones end before a sent one: then the running count
    of sent ones is the same at both ends. So no list of positions is needed, whose length only a host could read.

    >>> positions_size(torch.tensor([True, False, False, False, False, False, True]))
    tensor(1)
    """
    if sent.device.type == "cpu":  # numpy is several times as fast there, and nobody waits for anything
        return torch.tensor(_cheapest(sent.numpy())[1])
    n, wide = len(sent), torch.int32 if len(sent) < 1 << 31 else torch.int64
    before = torch.nn.functional.pad(sent, (1, 0)).cumsum(0, dtype=wide)  # n + 1 counts of sent ones, from 0 on
    count = gaps = before[-1].long()
    for bits in _SHIFTS:
        if 1 << bits < n:
            gaps = gaps + (sent[1 << bits :] & (before[1 << bits : -1] == before[: n - (1 << bits)])).sum()
    fewest = torch.minimum(gaps, 4 * count).clamp(max=-(-n // 8))
    return torch.where(count == n, 0, fewest)


def size_range(coding: Coding, n: int, count: int) -> tuple[int, int]:
    """Compute the fewest and most bytes that ``count`` positions of ``n`` may take in a coding.

    If the fewest exceed the most, the coding is never the cheapest for this count, and is never written.
    """
    bitmap, flat = -(-n // 8), 4 * count
    ranges = {
        Coding.ALL: (0, 0),
        Coding.BITMAP: (bitmap, min(bitmap, flat)),
        Coding.FLAT: (flat, min(flat, bitmap - 1)),
        Coding.GAPS: (count, min(flat, bitmap) - 1),
    }
    return ranges[coding]


def read_positions(coding: Coding, data: Bytes, n: int, count: int) -> Bools:
    """Decode positions: bool (n,), ``count`` of them True.

    Raises:
        ValueError: they are not ``count`` increasing positions below ``n``.

    """
    if coding == Coding.ALL:
        return np.ones(n, dtype=bool)
    if coding == Coding.BITMAP:
        return read_bitmap(data, n, count)
    index = data.view("<u4").astype(np.int64) if coding == Coding.FLAT else _read_gaps(data, count)
    if len(index) and (int(index[-1]) >= n or bool((index[1:] <= index[:-1]).any())):
        raise ValueError(f"positions must increase strictly and stay below {n}")
    sent = np.zeros(n, dtype=bool)
    sent[index] = True
    return sent


def _cheapest(sent: Bools) -> tuple[Coding, int, Ints]:
    """Choose the coding of the fewest bytes, of equal ones the first: coding, bytes, and gaps if these were needed."""
    nothing = np.zeros(0, dtype=np.int64)
    if sent.all():
        return Coding.ALL, 0, nothing
    bitmap, count = -(-len(sent) // 8), int(np.count_nonzero(sent))
    if count >= bitmap:  # a gap takes a byte or more
        return Coding.BITMAP, bitmap, nothing
    gaps = _gaps(np.flatnonzero(sent))
    sizes = {Coding.BITMAP: bitmap, Coding.FLAT: 4 * count, Coding.GAPS: int(_widths(gaps).sum(dtype=np.int64))}
    coding = min(sizes, key=lambda name: sizes[name])
    return coding, sizes[coding], gaps


def write_bitmap(sent: Bools) -> bytes:
    """Write bool (n,), one bit a coordinate, least significant first."""
    return np.packbits(sent, bitorder="little").tobytes()


def read_bitmap(data: Bytes, n: int, count: int) -> Bools:
    """Read bool (n,), ``count`` of them True.

    Raises:
        ValueError: another number is marked, or one beyond n.

    """
    bits = np.unpackbits(data, bitorder="little").view(bool)
    if bits[n:].any() or int(np.count_nonzero(bits)) != count:
        raise ValueError(f"positions: the bitmap does not mark {count} of {n}")
    return bits[:n]


def _gaps(index: Ints) -> Ints:
    """Count the coordinates that are skipped before each position."""
    return np.diff(index, prepend=-1) - 1


def _widths(gaps: Ints) -> npt.NDArray[np.uint8]:
    """Count the bytes of each gap."""
    widths = np.ones(len(gaps), dtype=np.uint8)
    if len(gaps) and int(gaps.max()) >= 1 << 7:
        for bits in _SHIFTS:
            widths += gaps >= 1 << bits
    return widths


def _write_gaps(gaps: Ints) -> bytes:
    widths = _widths(gaps)
    ends = np.cumsum(widths, dtype=np.int64)
    data = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for byte in range(int(widths.max(initial=0))):
        there = widths > byte
        more = (widths[there] > byte + 1).astype(np.uint8) << 7
        data[ends[there] - widths[there] + byte] = (gaps[there] >> 7 * byte) & 127 | more
    return data.tobytes()


def _read_gaps(data: Bytes, count: int) -> Ints:
    """Sum the gaps byte by byte, and read the sum where a gap ends; at most two integers a byte are allocated."""
    more = data >= 128
    ends = ~more
    if np.count_nonzero(ends) != count or (count and not ends[-1]):
        raise ValueError(f"positions: the gaps are not those of {count} values")
    parts = (data & 127).astype(np.int64)
    _shift(parts, more, data)
    parts += ends  # the position itself
    index = np.cumsum(parts, out=parts)[ends]
    index -= 1
    return index


def _shift(parts: Ints, more: Bools, data: Bytes) -> None:
    """Shift the seven bits of each gap's second and later bytes to their significance, in place."""
    later = np.flatnonzero(more) + 1  # bytes after the first of a gap
    if bool((data[later] == 0).any()):
        raise ValueError("positions: a gap takes more bytes than it needs")
    for byte in range(1, 6):
        if byte == 5 and len(later):
            raise ValueError("positions: a gap takes more than five bytes")
        parts[later] <<= 7
        later = later[more[later]] + 1
