import math
import pickle
import struct

import numpy as np
import plain_wire
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.federation.exchange.wire import message as wire
from fedsparse.federation.exchange.wire.positions import Coding, read_positions, size_range, write_positions

ROWS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INF, NAN = math.inf, math.nan


def bits(values):
    return values.contiguous().view(BITS[values.dtype.itemsize]).tolist() if len(values) else []


def any_bits(count, dtype, seed):
    """Numbers of every kind: NaN with payloads, both zeros, infinities and subnormal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN], dtype=dtype)
    chosen = torch.randint(0, 10, (count,), generator=generator)
    return torch.where(chosen < 5, special[chosen % 5], row) if count else row


def some(count, fraction, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < fraction


def true_at(marks):
    return [i for i, mark in enumerate(marks.tolist()) if mark]


FRACTIONS = st.sampled_from([0.0, 0.002, 0.03, 0.1, 0.3, 0.9, 1.0])
CASES = {
    "dtype": st.sampled_from(ROWS),
    "count": st.one_of(st.integers(0, 40), st.integers(41, 3000)),
    "sent": st.none() | FRACTIONS,
    "mask": st.none() | FRACTIONS,
    "extra": st.none() | st.integers(0, 9),
    "weight": st.floats(0, 1e300),
    "loss": st.floats(),
    "seed": st.integers(0, 1000),
}


def case(count, sent, mask, seed):
    """``sent`` and ``mask`` as they are given, and the positions in the row and within the mask by loops."""
    mask = None if mask is None else some(count, mask, seed + 1)
    sent = None if sent is None else some(count, sent, seed + 2) & (True if mask is None else mask)
    known = range(count) if mask is None else true_at(mask)
    places = list(known) if sent is None else true_at(sent)
    rank = {place: i for i, place in enumerate(known)}
    return sent, mask, places, [rank[place] for place in places], len(known)


@settings(max_examples=400, deadline=None)
@given(**CASES)
def test_round_trip_is_exact_and_the_positions_are_the_cheapest(dtype, count, sent, mask, extra, weight, loss, seed):
    row = any_bits(count, dtype, seed)
    buffers = None if extra is None else any_bits(extra, dtype, seed + 3)
    sent, mask, places, inside, n = case(count, sent, mask, seed)
    payload = wire.encode(row, sent, mask=mask, buffers=buffers, weight=weight, loss=loss)
    back = wire.read(payload, count, mask=mask)
    assert true_at(back.sent) == places
    assert back.values.dtype == dtype
    assert bits(back.values) == [b if i in set(places) else 0 for i, b in enumerate(bits(row))]
    assert bits(back.buffers) == ([] if extra is None else bits(buffers))
    assert struct.pack("<dd", back.weight, back.loss) == struct.pack("<dd", weight, loss)
    coding, positions = plain_wire.cheapest(inside, n)
    assert payload[7] == coding
    assert payload[48 : 48 + len(positions)] == positions
    size = wire.split_size(payload)
    values = (len(places) + (extra or 0)) * dtype.itemsize
    assert (size.header, size.positions, size.values) == (48, len(positions), values)
    assert size.total == len(payload)


def test_decode_returns_values_and_sent():
    row = torch.tensor([1.0, 0.0, 3.0])
    values, sent = wire.decode(wire.encode(row, torch.tensor([False, True, True])), 3)
    assert values.tolist() == [0, 0, 3]  # a zero that is sent differs from one that is not
    assert sent.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("positions", "n", "coding"),
    [
        ([], 0, Coding.ALL),
        ([0, 1, 2], 3, Coding.ALL),
        ([], 9, Coding.FLAT),  # nothing takes nothing
        ([3], 8, Coding.BITMAP),  # one byte each: the first
        ([3], 9, Coding.GAPS),
        ([127], 200, Coding.GAPS),
        ([128], 200, Coding.GAPS),
        ([2**14 - 1, 2**15], 2**15 + 1, Coding.GAPS),
        ([2**14, 2**20, 2**21], 2**21 + 1, Coding.GAPS),
        ([2**21 - 1], 2**21, Coding.GAPS),
        ([2**21], 2**21 + 1, Coding.FLAT),  # four bytes each: the first
        ([2**21, 2**22 + 1], 2**22 + 2, Coding.FLAT),
        ([5, 2**22], 2**22 + 2, Coding.GAPS),  # one byte and four
    ],
)
def test_every_coding_where_it_is_the_cheapest(positions, n, coding):
    marks = np.zeros(n, dtype=bool)
    marks[positions] = True
    assert plain_wire.cheapest(positions, n)[0] == coding
    assert write_positions(marks) == (coding, plain_wire.position_bytes(coding, positions, n))
    data = np.frombuffer(plain_wire.position_bytes(coding, positions, n), dtype=np.uint8)
    assert np.flatnonzero(read_positions(coding, data, n, len(positions))).tolist() == positions


@pytest.mark.parametrize(
    ("coding", "data", "n", "count"),
    [
        (Coding.BITMAP, [0b1000_0001], 7, 2),  # beyond the end
        (Coding.BITMAP, [0b0000_0011], 7, 1),
        (Coding.FLAT, [1, 0, 0, 0, 1, 0, 0, 0], 99, 2),
        (Coding.FLAT, [2, 0, 0, 0, 1, 0, 0, 0], 99, 2),
        (Coding.FLAT, [99, 0, 0, 0], 99, 1),
        (Coding.FLAT, [255, 255, 255, 255], 99, 1),
        (Coding.GAPS, [98, 0], 99, 2),
        (Coding.GAPS, [5, 0x80, 0x00], 99, 2),  # a zero in two bytes
        (Coding.GAPS, [5, 0x85, 0x80, 0x00], 99, 2),
        (Coding.GAPS, [5, 0x80], 99, 1),  # cut
        (Coding.GAPS, [0x80], 99, 1),
        (Coding.GAPS, [5, 5], 99, 1),
        (Coding.GAPS, [0x80, 0x80, 0x80, 0x80, 0x01], 99, 1),  # 2**28
        (Coding.GAPS, [0x80, 0x80, 0x80, 0x80, 0x80, 0x01], 99, 1),  # 2**35
        (Coding.GAPS, [0x80, 0x80, 0x80, 0x80, 0x80, 0x01], 2**28 + 4, 1),  # not 2**28 either
        (Coding.GAPS, [0xFF] * 11 + [0x01], 99, 1),  # would turn over in 64 bits
    ],
)
def test_positions_increase_strictly_below_the_end_and_are_written_one_way(coding, data, n, count):
    with pytest.raises(ValueError, match="positions"):
        read_positions(coding, np.array(data, dtype=np.uint8), n, count)


def test_five_bytes_of_a_gap_are_read():
    data = np.array([0x80, 0x80, 0x80, 0x80, 0x01, 0x02], dtype=np.uint8)
    marks = read_positions(Coding.GAPS, data, 2**28 + 4, 2)
    assert np.flatnonzero(marks).tolist() == [2**28, 2**28 + 3]


def test_bytes_of_a_message_worked_out_by_hand():
    """Row of 40; the mask leaves every second; of these 20 the 2nd and 18th are sent, and one buffer value.

    Gaps 1 and 15 take two bytes, a bitmap three. float32: 1.5 is 0x3fc00000, -2 is 0xc0000000, 0.5 is 0x3f000000.
    """
    row, sent = torch.zeros(40), torch.zeros(40, dtype=torch.bool)
    row[2], row[34] = 1.5, -2.0
    sent[[2, 34]] = True
    mask = torch.arange(40) % 2 == 0
    body = bytes([1, 15]) + bytes.fromhex("0000c03f 000000c0 0000003f")
    expected = plain_wire.message(body, 0, 0, plain_wire.GAPS, 20, 2, 1, 8.0, 0.25, 1.5)
    payload = wire.encode(row, sent, mask=mask, buffers=torch.tensor([0.5]), weight=8.0, loss=0.25, steps=1.5)
    assert payload == expected
    head = "46535058 03 00 00 03 14000000 02000000 01000000"
    assert payload[:20] == bytes.fromhex(head)
    assert payload[24:48] == bytes.fromhex("0000000000002040 000000000000d03f 000000000000f83f")


def test_bytes_of_eight_bit_steps_worked_out_by_hand():
    """Largest 254: step 2. 3 / 2 = 1.5 rounds to the even 2, -5 / 2 = -2.5 to -2; a block of zeros has no step."""
    row = torch.zeros(300, dtype=torch.float16)
    row[0], row[1], row[2] = 254, 3, -5
    body = struct.pack("<ff", 2.0, 0.0) + bytes([127, 2, 254]) + bytes(297)
    payload = wire.encode(row, dtype=torch.int8)
    assert payload == plain_wire.message(body, 4, 2, plain_wire.ALL, 300, 300, 0, 0.0, 0.0)
    assert wire.decode(payload, 300)[0][:4].tolist() == [254, 4, -4, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row_dtype", ROWS)
def test_half_precision_rounds_as_torch_and_stops_at_the_largest(row_dtype, dtype):
    drawn = torch.randn(500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 5, 500)
    row = torch.cat([drawn, torch.tensor([65504, 65519, 65521, 3.39e38, 3.4e38, 1e300, INF, NAN, -0.0])]).to(row_dtype)
    row = torch.cat([row, -row])
    wired = row.to(dtype)
    largest = torch.finfo(dtype).max
    for i in range(len(row)):
        if math.isinf(wired[i]) and not math.isinf(row[i]):
            wired[i] = math.copysign(largest, row[i])
    values, sent = wire.decode(wire.encode(row, dtype=dtype), len(row))
    assert bits(values) == bits(wired.to(row_dtype))
    assert sent.all()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 300_000])
@pytest.mark.parametrize("fraction", [0.4, 1.0])
def test_eight_bits_err_by_half_a_step_of_their_block_at_most(count, fraction):
    row = torch.randn(count, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, count)
    sent = some(count, fraction, 2)
    values, back = wire.decode(wire.encode(row, sent, dtype=torch.int8), count)
    assert torch.equal(back, sent)
    assert not values[~sent].any()
    was, now = row[sent].double(), values[sent].double()
    for start in range(0, len(was), 256):
        block, got = was[start : start + 256], now[start : start + 256]
        largest = max(block.abs().tolist())
        assert max((block - got).abs().tolist()) <= largest / 254 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ROWS)
def test_eight_bits_of_the_largest_number_stay_finite(dtype):
    row = torch.tensor(
        [torch.finfo(dtype).max if dtype != torch.float64 else torch.finfo(torch.float32).max], dtype=dtype
    )
    row = torch.cat([row, -row, row * 0.7])
    values, _ = wire.decode(wire.encode(row, dtype=torch.int8), 3)
    assert torch.allclose(values.double(), row.double(), rtol=1 / 127)


@pytest.mark.parametrize("count", [1000, 30_000, 1_000_000])
def test_a_tenth_of_a_row_costs_at_most_015_of_all(count):
    generator = torch.Generator().manual_seed(0)
    sent = torch.zeros(count, dtype=torch.bool)
    sent[torch.randperm(count, generator=generator)[: round(0.1 * count)]] = True
    assert len(wire.encode(torch.randn(count, generator=generator), sent)) <= 0.15 * 4 * count


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("extra", [0, 5])
def test_known_size_is_that_of_a_message_of_known_positions(dtype, extra):
    row, mask = torch.randn(1000).to(dtype), some(1000, 0.3, 0)
    payload = wire.encode(row, mask=mask, buffers=torch.ones(extra))
    assert wire.known_size(int(mask.sum()), extra, dtype) == wire.split_size(payload)
    assert wire.known_size(int(mask.sum()), extra, dtype).total == len(payload)


def test_strided_rows_and_those_of_a_graph():
    row = torch.arange(20.0, requires_grad=True)[::2]
    values, _ = wire.decode(wire.encode(row, torch.arange(10) % 3 == 0), 10)
    assert values.tolist() == [0, 0, 0, 6, 0, 0, 12, 0, 0, 18]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"row": torch.zeros(2, 2)}, "one row"),
        ({"row": torch.tensor(1.0)}, "one row"),
        ({"row": torch.zeros(1).expand(1 << 32)}, "fewer than 2..32 coordinates"),  # takes the memory of one
        ({"row": torch.zeros(4, dtype=torch.int64)}, "float32"),
        ({"row": torch.zeros(4), "dtype": torch.int32}, "float32"),
        ({"row": torch.zeros(4), "sent": torch.ones(3, dtype=torch.bool)}, "sent must be a bool"),
        ({"row": torch.zeros(4), "mask": torch.ones(4)}, "mask must be a bool"),
        ({"row": torch.zeros(2), "sent": torch.tensor([True, True]), "mask": torch.tensor([True, False])}, "outside"),
        ({"row": torch.zeros(4), "weight": -1.0}, "weight is .*; it must be a finite number of 0 or more"),
        ({"row": torch.zeros(4), "weight": NAN}, "weight is .*; it must be a finite number of 0 or more"),
        ({"row": torch.tensor([NAN]), "dtype": torch.int8}, "8-bit"),
        ({"row": torch.tensor([1e300], dtype=torch.float64), "dtype": torch.int8}, "8-bit"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_a_line(arguments, says):
    with pytest.raises(ValueError, match=says) as caught:
        wire.encode(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(4)])
def test_mask_of_the_receiver_fits_the_row(mask):
    with pytest.raises(ValueError, match="mask must be a bool tensor of shape"):
        wire.decode(wire.encode(torch.zeros(4)), 4, mask=mask)


def test_an_error_comes_through_from_another_process():
    error = pickle.loads(pickle.dumps(wire.PayloadError("crc", "broken")))  # noqa: S301
    assert (error.field, str(error)) == ("crc", "payload crc: broken")


def test_a_row_of_another_dtype_than_expected_is_refused_before_it_is_allocated():
    payload = wire.encode(torch.ones(5, dtype=torch.float64))
    assert wire.decode(payload, 5)[0].dtype == wire.decode(payload, 5, dtype=torch.float64)[0].dtype == torch.float64
    with pytest.raises(wire.PayloadError, match="torch.float64, where torch.float32 is expected") as error:
        wire.decode(payload, 5, dtype=torch.float32)
    assert error.value.field == "row dtype"


def test_lengths_of_preparation_are_those_of_messages():
    tensors = [torch.rand(3, 4), torch.rand(4), torch.rand(2, 2, 2)]
    payload = wire.encode(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    assert wire.length(*tensors) == len(payload) == 48 + 4 * 24
    assert wire.known_size(24, 0, torch.float32).total == len(payload)
    assert wire.bitmap_size(17).total == 48 + 3


def test_bytes_of_several_messages_by_hand():
    one, other = wire.Size(1, 20, 300), wire.Size(4, 50, 600)
    assert one + other == wire.Size(5, 70, 900)
    assert one * 3 == wire.Size(3, 60, 900)
    assert one.total == 321


@pytest.mark.parametrize(
    ("coding", "n", "count", "wanted"),
    [
        # of 20 coordinates a bitmap takes 3 bytes, a number each 4 bytes, a gap each at least 1
        (Coding.ALL, 20, 20, (0, 0)),
        (Coding.BITMAP, 20, 10, (3, 3)),
        (Coding.BITMAP, 20, 0, (3, 0)),  # none take no bytes as numbers: nobody writes a bitmap
        (Coding.FLAT, 20, 1, (4, 2)),
        (Coding.GAPS, 20, 2, (2, 2)),
        (Coding.GAPS, 20, 3, (3, 2)),
        # of 4000 the bitmap takes 500
        (Coding.FLAT, 4000, 3, (12, 12)),
        (Coding.GAPS, 4000, 3, (3, 11)),
    ],
)
def test_the_bytes_that_positions_may_take_by_hand(coding, n, count, wanted):
    assert size_range(coding, n, count) == wanted
