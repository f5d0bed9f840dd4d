"""The wire format of a message: header, positions, values, buffers; versioned, checked, without pickle.

``encode`` and ``decode`` are independent of the simulator. Shapes: P coordinates of a row, n of them within the mask
that both sides have, k of these sent, Q values of float buffers. Numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsparse.core.checks import check_number
from fedsparse.federation.exchange.wire.positions import (
    Coding,
    read_bitmap,
    read_positions,
    size_range,
    write_bitmap,
    write_positions,
)
from fedsparse.federation.exchange.wire.values import CODES, DTYPES, raw, read_values, values_size, write_values

# magic, version, dtype of the values, dtype of the row, coding of the positions, n, k, Q, CRC32, weight, loss, steps
HEADER = struct.Struct("<4sBBBBIIIIddd")
MAGIC, MASK, VERSION = b"FSPX", b"FSPM", 3
_CRC_AT = 20  # offset of the CRC, which covers all other bytes
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 16  # coordinates that are decoded at a time


class PayloadError(ValueError):
    """A message is damaged or unexpected.

    Attributes:
        field: the faulty field of the header, or ``header``, ``length``, ``crc`` or ``positions``.

    """

    def __init__(self, field: str, what: str) -> None:
        super().__init__(field, what)  # both, so that it can be pickled from another process
        self.field = field

    def __str__(self) -> str:
        return f"payload {self.args[0]}: {self.args[1]}"


@dataclass(frozen=True)
class Size:
    """Bytes of a message by part."""

    header: int
    positions: int
    values: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.header + self.positions + self.values

    def __add__(self, other: Size) -> Size:
        """Bytes of both messages."""
        return Size(self.header + other.header, self.positions + other.positions, self.values + other.values)

    def __mul__(self, times: int) -> Size:
        """Bytes of so many messages."""
        return Size(times * self.header, times * self.positions, times * self.values)


@dataclass(frozen=True)
class Message:
    """The content of a message.

    Attributes:
        values: (P,), 0 where not sent.
        sent: bool (P,).
        buffers: (Q,) float buffers, and all other values that are never rounded.
        weight: weight in the average.
        loss: mean training loss.
        steps: sum of step weights (``drift.step_weight``).

    """

    values: Tensor
    sent: Tensor
    buffers: Tensor
    weight: float
    loss: float
    steps: float


@dataclass(frozen=True)
class _Head:
    """The checked fields of a header."""

    dtype: torch.dtype
    row: torch.dtype
    coding: Coding
    count: int
    extra: int
    weight: float
    loss: float
    steps: float


def known_size(count: int, extra: int, dtype: torch.dtype) -> Size:
    """Bytes of a message without positions, which both sides have: so many values and buffer values of one dtype."""
    return Size(HEADER.size, 0, (count + extra) * dtype.itemsize)


def counted_size(count: int, positions: int, extra: int, dtype: torch.dtype, row: torch.dtype) -> Size:
    """Bytes of a message of so many values in a dtype, so many bytes of positions, and buffer values in the row's."""
    return Size(HEADER.size, positions, values_size(dtype, count) + extra * row.itemsize)


def length(*tensors: Tensor) -> int:
    """Bytes of the message with these tensors, of one dtype, as one row."""
    return len(encode_tensors(tensors))


def encode_tensors(tensors: Iterable[Tensor]) -> bytes:
    """Encode tensors of one dtype as one row, one after the other."""
    return encode(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))


def bitmap_size(size: int) -> Size:
    """Bytes of a message with the mask of so many coordinates, one bit each."""
    return Size(HEADER.size, -(-size // 8), 0)


def encode(
    row: Tensor,
    sent: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    buffers: Tensor | None = None,
    weight: float = 0.0,
    loss: float = 0.0,
    steps: float = 0.0,
) -> bytes:
    """Encode the sent coordinates of a row as a message; ``decode`` returns them exactly if ``dtype`` is the row's.

    Args:
        row: (P,), floating point.
        sent: bool (P,), coordinates to send; None for all within the mask. Zeros are sent like other values.
        mask: bool (P,), coordinates that may be sent, which both sides have; None for all.
        dtype: of the values on the wire: the row's by default, float16, bfloat16, or int8 for 8-bit steps.
        buffers: (Q,) float buffers, sent in the row's dtype.
        weight: weight in the average, finite and not negative.
        loss: mean training loss.
        steps: sum of step weights, finite and not negative.

    Raises:
        ValueError: coordinates to send lie outside the mask, or shapes, dtypes, weight or steps do not fit.

    """
    dtype = dtype or row.dtype
    check_sendable(row.dtype, dtype, weight, steps)
    marks = _marks(row, sent, mask)
    values = _chosen(row.detach().cpu(), sent if sent is not None else mask)
    coding, positions = write_positions(marks)
    extra = row.new_zeros(0) if buffers is None else buffers.to(row.dtype)
    codes = CODES[dtype], CODES[row.dtype], int(coding)
    fields = (MAGIC, VERSION, *codes, len(marks), len(values), len(extra), 0, weight, loss, steps)
    return _seal(HEADER.pack(*fields), positions, write_values(values, dtype), raw(extra))


def decode(
    payload: bytes, size: int, *, mask: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Decode the row of a message: values (P,), 0 where not sent, and sent, bool (P,).

    Args:
        payload: the message.
        size: P.
        mask: bool (P,), coordinates that may be sent, equal to the sender's.
        dtype: expected dtype of the row, so that no larger one is allocated; None for any.

    Raises:
        PayloadError: the message is damaged or unexpected. Beside the row and ``sent``, at most about two bytes a
            coordinate are allocated, and those before them.
        ValueError: the mask is not of the row's shape.

    """
    message = read(payload, size, mask=mask, dtype=dtype)
    return message.values, message.sent


def read(payload: bytes, size: int, *, mask: Tensor | None = None, dtype: torch.dtype | None = None) -> Message:
    """Decode the whole content of a message; arguments and errors as those of ``decode``."""
    if mask is not None and (mask.shape != (size,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be a bool tensor of shape ({size},), not {mask.dtype} of {tuple(mask.shape)}")
    known = None if mask is None else mask.cpu().numpy()
    n = size if known is None else int(np.count_nonzero(known))
    head = _checked(payload, n, dtype)
    data = np.frombuffer(payload, dtype=np.uint8, offset=HEADER.size)
    values_at = len(data) - values_size(head.dtype, head.count) - head.extra * head.row.itemsize
    extra_at = len(data) - head.extra * head.row.itemsize
    marks = _positions(head, data[:values_at], n)
    sent = marks if known is None else _spread(marks, known)
    row = _row(head, sent, data[values_at:extra_at])
    buffers = read_values(data[extra_at:], head.row, head.extra, head.row)
    return Message(row, torch.from_numpy(sent), buffers, head.weight, head.loss, head.steps)


def encode_mask(mask: Tensor) -> bytes:
    """Encode a mask as a message of positions alone: bool (P,), one bit a coordinate, least significant first."""
    bits = write_bitmap(mask.cpu().numpy())
    return _seal(HEADER.pack(MASK, VERSION, 0, 0, int(Coding.BITMAP), len(mask), int(mask.sum()), 0, 0, 0, 0, 0), bits)


def decode_mask(payload: bytes, size: int) -> Tensor:
    """Decode the message of a mask: bool (P,).

    Raises:
        PayloadError: the message is damaged or unexpected.

    """
    wanted = bitmap_size(size).total
    _expect(len(payload) == wanted, "length", f"{len(payload)} bytes, where a mask of {size} coordinates has {wanted}")
    magic, version, _, _, coding, total, count, _, crc, *_ = HEADER.unpack_from(payload)
    _expect(magic == MASK, "magic", f"{magic!r} does not begin a mask of fedsparse")
    _expect(version == VERSION, "version", f"{version} cannot be read, only {VERSION}")
    _expect(coding == Coding.BITMAP, "coding", f"{coding} is no coding of a mask")
    _expect(total == size, "size", f"{total} coordinates, where {size} are expected")
    view = memoryview(payload)
    _expect(crc == _crc(view[: HEADER.size], view[HEADER.size :]), "crc", "the message was damaged on its way")
    try:
        return torch.from_numpy(read_bitmap(np.frombuffer(payload, np.uint8, offset=HEADER.size), size, count))
    except ValueError as error:
        raise PayloadError("positions", str(error).removeprefix("positions: ")) from None


def split_size(payload: bytes) -> Size:
    """Split the bytes of a valid message, such as one just encoded, by part."""
    _, _, code, row, _, _, count, extra, *_ = HEADER.unpack_from(payload)
    values = values_size(DTYPES[code], count) + extra * DTYPES[row].itemsize
    return Size(HEADER.size, len(payload) - HEADER.size - values, values)


def check_sendable(row: torch.dtype, dtype: torch.dtype, weight: float, steps: float) -> None:
    """Refuse what no header can say.

    Raises:
        ValueError: the row cannot be sent in this dtype, or weight or steps are negative or not finite.

    """
    if CODES.get(row) is None or row == torch.int8 or dtype not in CODES:
        raise ValueError(f"a row of {row} cannot be sent as {dtype}; use float32, float64, float16, bfloat16")
    for name, number in (("weight", weight), ("steps", steps)):
        check_number(name, number, least=0, double=True)


def _marks(row: Tensor, sent: Tensor | None, mask: Tensor | None) -> npt.NDArray[np.bool_]:
    """Mark the sent coordinates among the n within the mask: bool (n,)."""
    for name, given in (("sent", sent), ("mask", mask)):
        if given is not None and (given.shape != row.shape or given.dtype != torch.bool):
            raise ValueError(f"{name} must be a bool tensor of the row's shape {tuple(row.shape)}")
    if row.dim() != 1 or len(row) >= 1 << 32:
        raise ValueError(f"a message holds one row of fewer than 2**32 coordinates, not {tuple(row.shape)}")
    if sent is not None and mask is not None and bool((sent & ~mask).any()):
        raise ValueError("coordinates outside the mask cannot be sent: the receiver would not know them")
    marks = torch.ones(len(row), dtype=torch.bool) if sent is None else sent.cpu()
    return (marks if mask is None else marks[mask.cpu()]).numpy()


def _chosen(row: Tensor, chosen: Tensor | None) -> Tensor:
    """Select values of a row, without changing a bit; torch's indexing would allocate eight bytes a value."""
    if chosen is None or not len(row):
        return row
    bits = row.contiguous().view(_BITS[row.dtype.itemsize]).numpy()[chosen.cpu().numpy()]
    return torch.from_numpy(bits).view(row.dtype)


def _seal(header: bytes, *body: bytes) -> bytes:
    """Write the CRC into a header, and the body after it."""
    crc = struct.pack("<I", _crc(header, *body))
    return b"".join((header[:_CRC_AT], crc, header[_CRC_AT + 4 :], *body))


def _crc(header: bytes | memoryview, *body: bytes | memoryview) -> int:
    """CRC32 of a message but for the field that holds it."""
    crc = 0
    for part in (header[:_CRC_AT], header[_CRC_AT + 4 :], *body):
        crc = zlib.crc32(part, crc)
    return crc


def _checked(payload: bytes, n: int, dtype: torch.dtype | None) -> _Head:
    """Check the header field by field, then the length, then the CRC, before anything is allocated."""
    if len(payload) < HEADER.size:
        raise PayloadError("header", f"{len(payload)} bytes are fewer than the {HEADER.size} of a header")
    magic, version, code, row, coding, total, count, extra, crc, weight, loss, steps = HEADER.unpack_from(payload)
    _expect(magic == MAGIC, "magic", f"{magic!r} does not begin a message of fedsparse")
    _expect(version == VERSION, "version", f"{version} cannot be read, only {VERSION}")
    _expect(code in DTYPES, "dtype", f"{code} is no dtype of values")
    _expect(row in DTYPES and DTYPES[row] != torch.int8, "row dtype", f"{row} is no dtype of a row")
    _expect(dtype in (None, DTYPES[row]), "row dtype", f"{DTYPES[row]}, where {dtype} is expected")
    _expect(coding in list(Coding), "coding", f"{coding} is no coding of positions")
    _expect(total == n, "size", f"{total} coordinates, where {n} are expected")
    _expect(count <= n, "count", f"{count} values of {n} coordinates")
    _expect((coding == Coding.ALL) == (count == n), "count", f"{count} of {n} in coding {coding}; 0 is for all alone")
    _expect(0 <= weight < math.inf, "weight", f"{weight} is negative or not finite")
    _expect(0 <= steps < math.inf, "steps", f"{steps} is negative or not finite")
    head = _Head(DTYPES[code], DTYPES[row], Coding(coding), count, extra, weight, loss, steps)
    _check_length(head, len(payload), n)
    view = memoryview(payload)
    _expect(crc == _crc(view[: HEADER.size], view[HEADER.size :]), "crc", "the message was damaged on its way")
    return head


def _check_length(head: _Head, length: int, n: int) -> None:
    fixed = HEADER.size + values_size(head.dtype, head.count) + head.extra * head.row.itemsize
    low, high = (fixed + bound for bound in size_range(head.coding, n, head.count))
    _expect(low <= high, "coding", f"{head.coding.name} is not the cheapest of {head.count} positions of {n}")
    wanted = f"{low}" if low == high else f"{low} to {high}"
    _expect(low <= length <= high, "length", f"{length} bytes, where the header asks for {wanted}")


def _expect(holds: bool, field: str, what: str) -> None:
    if not holds:
        raise PayloadError(field, what)


def _row(head: _Head, sent: npt.NDArray[np.bool_], data: npt.NDArray[np.uint8]) -> Tensor:
    """Write the sent values into a row of zeros, piece by piece, so that little is allocated beside the row."""
    row, done = torch.zeros(len(sent), dtype=head.row), 0
    for at in range(0, len(sent), _PIECE):
        marks = sent[at : at + _PIECE]
        piece = slice(done, done + int(np.count_nonzero(marks)))
        values = read_values(data, head.dtype, head.count, head.row, piece)
        row[at : at + _PIECE].masked_scatter_(torch.from_numpy(marks), values)
        done = piece.stop
    return row


def _positions(head: _Head, data: npt.NDArray[np.uint8], n: int) -> npt.NDArray[np.bool_]:
    try:
        return read_positions(head.coding, data, n, head.count)
    except ValueError as error:
        raise PayloadError("positions", str(error).removeprefix("positions: ")) from None


def _spread(marks: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Spread marks (n,) within a mask over the whole row: bool (P,)."""
    sent = np.zeros(len(known), dtype=bool)
    sent[known] = marks
    return sent
