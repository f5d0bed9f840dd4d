"""Damaged and forged messages: the right values or a PayloadError, and never much memory."""

import random
import struct
import tracemalloc
import weakref
import zlib

import numpy as np
import plain_wire
import pytest
import torch
from fuzzing import attempts, hammer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsparse.federation.exchange.wire import message as wire

MUTATIONS = 20_000
FIELDS = {"magic", "version", "dtype", "row dtype", "coding", "size", "count", "weight", "steps"}
FIELDS |= {"header", "length", "crc", "positions"}
ITEMS = {0: 4, 1: 8, 2: 2, 3: 2, 4: 1}  # bytes of a dtype's code
HUGE = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


def repaired(payload):
    """The same with a CRC that is right."""
    if len(payload) < plain_wire.HEADER:
        return payload
    rest = payload[: plain_wire.CRC_AT] + payload[plain_wire.CRC_AT + 4 :]
    return payload[: plain_wire.CRC_AT] + struct.pack("<I", zlib.crc32(rest)) + payload[plain_wire.CRC_AT + 4 :]


def flip(payload, rng):
    out = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_body(payload, rng):
    """Damage to positions and values alone, the positions most often."""
    if len(payload) == plain_wire.HEADER:
        return payload
    out, end = bytearray(payload), min(len(payload), plain_wire.HEADER + rng.choice((4, 40, 4000)))
    for _ in range(rng.choice((1, 2, 5))):
        out[rng.randrange(plain_wire.HEADER, end)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(out)


def swap(payload, rng):
    """Two neighbouring bytes change places: sums stay what they were."""
    out = bytearray(payload)
    at = rng.randrange(len(out) - 1)
    out[at], out[at + 1] = out[at + 1], out[at]
    return bytes(out)


def cut(payload, rng):
    return payload[: rng.choice((rng.randrange(len(payload)), len(payload) - 1))]


def append(payload, rng):
    return payload + rng.randbytes(rng.choice((1, 2, 4, 8, 300)))


def remove(payload, rng):
    at = rng.randrange(len(payload))
    return payload[:at] + payload[at + rng.choice((1, 4)) :]


def recount(payload, rng):
    """Size, count or number of buffer values: wrong by a little, or huge."""
    at = rng.choice((8, 12, 16))
    was = struct.unpack_from("<I", payload, at)[0]
    now = rng.choice((was + 1, was - 1, *HUGE, rng.randrange(2**32))) % 2**32
    return payload[:at] + struct.pack("<I", now) + payload[at + 4 :]


def recode(payload, rng):
    """Magic, version, dtypes or coding."""
    out = bytearray(payload)
    out[rng.randrange(8)] = rng.choice((0, 1, 2, 3, 4, 5, 255))
    return bytes(out)


def reweigh(payload, rng):
    return payload[:24] + struct.pack("<d", rng.choice((-1.0, 1e308, float("nan"), float("inf")))) + payload[32:]


def drop_coding(payload, rng):
    """The same positions in another coding than the cheapest, and bytes that fit it."""
    n, count = struct.unpack_from("<II", payload, 8)
    coding, positions = rng.randrange(4), sorted(rng.sample(range(n), count))
    extra = struct.unpack_from("<I", payload, 16)[0]
    values = count * ITEMS[payload[5]] + (4 * -(-count // 256) if payload[5] == 4 else 0) + extra * ITEMS[payload[6]]
    body = plain_wire.position_bytes(coding, positions, n) + payload[len(payload) - values :] * (values > 0)
    return payload[:7] + bytes([coding]) + payload[8 : plain_wire.HEADER] + body


DAMAGE = [flip, flip_body, flip_body, swap, cut, append, remove, recount, recode, reweigh, drop_coding]


def row_of(count, dtype, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(count, fraction, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < fraction


def messages():
    """Messages of every coding, dtype and kind of mask: payload, size, mask."""
    kinds = [
        (700, None),
        (700, 0.01),
        (700, 0.06),
        (700, 0.4),
        (700, 0.0),
        (1, None),
        (0, None),
        (9, 0.5),
        (3000, 0.004),
    ]
    dtypes = [
        (row, wired) for row in (torch.float32, torch.float64, torch.float16, torch.bfloat16) for wired in (row, 0)
    ]
    found = []
    for seed, (row_dtype, wired) in enumerate(
        [*dtypes, (torch.float32, torch.float16), (torch.float64, torch.bfloat16)]
    ):
        for count, fraction in kinds:
            for known in (None, 0.5):
                mask = None if known is None else drawn(count, known, seed)
                sent = None if fraction is None else drawn(count, fraction, seed + 1) & (True if mask is None else mask)
                buffers = row_of(3, row_dtype, seed) if seed % 2 else None
                row, dtype = row_of(count, row_dtype, seed), wired or torch.int8
                payload = wire.encode(row, sent, mask=mask, dtype=dtype, buffers=buffers, weight=3.0, loss=1.0)
                found.append((payload, count, mask))
    return found


def test_the_messages_cover_every_coding_and_dtype():
    every = [payload for payload, _, _ in messages()]
    assert {payload[7] for payload in every} == {0, 1, 2, 3}
    assert {(payload[5], payload[6]) for payload in every} >= {(c, r) for r in range(4) for c in (r, 4)}


def check_accepted(payload, size, mask, message):
    """What an accepted message says is what its header and its positions say, these written in the one way."""
    n, count, extra = struct.unpack_from("<III", payload, 8)
    places = [i for i, mark in enumerate(message.sent.tolist()) if mark]
    known = [i for i in range(size) if mask is None or mask[i]]
    assert message.values.shape == message.sent.shape == (size,)
    assert message.buffers.shape == (extra,)
    assert message.values.dtype.itemsize == message.buffers.dtype.itemsize == ITEMS[payload[6]]
    assert len(places) == count
    assert n == len(known)
    rank = {place: i for i, place in enumerate(known)}
    written = plain_wire.position_bytes(payload[7], [rank[place] for place in places], n)
    values = count * ITEMS[payload[5]] + (4 * -(-count // 256) if payload[5] == 4 else 0)
    assert payload[plain_wire.HEADER : len(payload) - values - extra * ITEMS[payload[6]]] == written
    assert not message.values[~message.sent].any()


def outcome(payload, size, mask):
    try:
        return wire.read(payload, size, mask=mask), None
    except wire.PayloadError as error:
        return None, error


@pytest.mark.fuzz
def test_damage_is_seen_or_harmless():
    base = messages()

    def attempt(number):
        rng = random.Random(number)
        payload, size, mask = rng.choice(base)
        forged = number % 2 == 1
        damaged = rng.choice(DAMAGE)(payload, rng)
        damaged = repaired(damaged) if forged else damaged
        message, error = outcome(damaged, size, mask)
        if error is not None:
            assert str(error).startswith(f"payload {error.field}: ")
            return error.field
        assert forged or damaged == payload
        check_accepted(damaged, size, mask, message)
        return "harmless" if damaged == payload else "accepted"

    ended = hammer(attempt, attempts(MUTATIONS), refusals=(), megabytes=64)
    assert set(ended) - {"harmless", "accepted"} == FIELDS  # every check was reached, and so was what lies behind them
    assert ended["accepted"] > attempts(MUTATIONS) // 40


@pytest.mark.parametrize(
    ("at", "bytes_", "field"),
    [
        (0, b"\x80\x04", "magic"),  # the beginning of a pickle
        (4, b"\x01", "version"),
        (4, b"\x02", "version"),
        (5, b"\x09", "dtype"),
        (6, b"\x04", "row dtype"),
        (7, b"\x04", "coding"),
        (7, b"\x02", "coding"),
        (8, b"\xff\xff\xff\xff", "size"),
        (12, b"\xff\xff\xff\xff", "count"),
        (16, b"\xff\xff\xff\xff", "length"),
        (24, struct.pack("<d", -1), "weight"),
        (32, struct.pack("<d", -1), "crc"),
        (48, b"\xff", "crc"),
    ],
)
def test_an_error_names_the_field(at, bytes_, field):
    payload = wire.encode(torch.ones(100), drawn(100, 0.5, 0))
    with pytest.raises(wire.PayloadError, match=f"^payload {field}: ") as caught:
        wire.decode(payload[:at] + bytes_ + payload[at + len(bytes_) :], 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("coding", "positions"),
    [(plain_wire.BITMAP, [5]), (plain_wire.BITMAP, []), (plain_wire.FLAT, [1, 5, 9, 40]), (plain_wire.GAPS, [])],
)
def test_a_coding_that_is_never_the_cheapest_is_refused(coding, positions):
    """Of 100 coordinates: a bitmap takes 13 bytes, flat indices 4 each, gaps 1 or more each."""
    body = plain_wire.position_bytes(coding, positions, 100) + bytes(4 * len(positions))
    payload = plain_wire.message(body, 0, 0, coding, 100, len(positions), 0, 1.0, 0.0)
    with pytest.raises(wire.PayloadError, match=f"^payload coding: {wire.Coding(coding).name} is not the cheapest"):
        wire.decode(payload, 100)


def test_a_row_of_another_length_or_mask_is_refused():
    payload = wire.encode(torch.ones(100), drawn(100, 0.5, 0))
    for size, mask in ((99, None), (101, None), (100, drawn(100, 0.5, 0))):
        with pytest.raises(wire.PayloadError, match="payload size"):
            wire.decode(payload, size, mask=mask)


class Memory(TorchDispatchMode):
    """Most bytes that numpy's arrays (by tracemalloc) and live tensors made by torch itself hold at once."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0

    def __enter__(self):
        entered = super().__enter__()
        torch.zeros(1).add_(1)  # imports much the first time
        self.live = self.most = 0
        tracemalloc.start()
        return entered

    def __exit__(self, *error):
        self.look()
        tracemalloc.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.count(made.untyped_storage().nbytes())
                weakref.finalize(made, self.count, -made.untyped_storage().nbytes())
        return out

    def count(self, size):
        self.look()
        self.live += size
        self.look()

    def look(self):
        if tracemalloc.is_tracing():
            self.most = max(self.most, self.live + tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()


def peak(payload, size, mask=None):
    """Bytes that reading a message takes at most, beside the message; and the field of its error, if any."""
    with Memory() as memory:
        error = outcome(payload, size, mask)[1]
    return memory.most, None if error is None else error.field


P = 1 << 20


def test_the_measure_counts_torch_and_numpy():
    with Memory() as memory:
        kept = torch.zeros(P)
        torch.zeros(P).add_(1)  # gone before the next
        double = kept * 2
        kept[:10].add_(1)
        array = np.zeros(P, dtype=np.uint8)
        np.zeros(P // 2, dtype=np.uint8)
    assert 9.5 * P <= memory.most < 9.6 * P
    assert len(double) == len(array)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.12, 0.124, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(
    ("row_dtype", "wired"),
    [(torch.float32, None), (torch.float32, torch.float16), (torch.float32, torch.int8), (torch.float16, None)],
)
def test_reading_takes_less_than_two_models(fraction, row_dtype, wired):
    payload = wire.encode(row_of(P, row_dtype, 0), drawn(P, fraction, 1), dtype=wired)
    taken, field = peak(payload, P)
    assert field is None
    assert P * row_dtype.itemsize < taken < 2 * P * row_dtype.itemsize


def test_reading_within_a_mask_takes_less_than_two_models():
    mask = drawn(P, 0.7, 2)
    payload = wire.encode(row_of(P, torch.float32, 0), drawn(P, 0.3, 1) & mask, mask=mask)
    assert peak(payload, P, mask)[0] < 2 * 4 * P


def test_damage_takes_less_than_two_models():
    rng = random.Random(1)
    for number in range(60):
        base = wire.encode(row_of(P, torch.float32, 0), drawn(P, (0.01, 0.12, 0.5)[number % 3], 1))
        damage = rng.choice([flip, flip_body, swap, cut, append, remove, recount, recode, reweigh])
        damaged = damage(base, rng)
        taken, field = peak(damaged, P)
        assert damaged == base or taken < 1 << 16  # refused before anything is allocated
        taken, field = peak(repaired(damaged), P)
        model = 4 if field is not None else ITEMS[repaired(damaged)[6]]  # a forged row dtype is a larger model
        assert taken < 2 * max(model, 4) * P


@pytest.mark.parametrize("coding", range(4))
@pytest.mark.parametrize("count", [0, 1, P // 32, P // 8, P - 1, P])
def test_forged_counts_take_less_than_two_models(coding, count):
    """Any coding with as many bytes as it needs: those that nobody writes are refused, not read at a price."""
    body = {0: 0, 1: P // 8, 2: 4 * count, 3: count}[coding]
    head = b"FSPX" + bytes([2, 0, 0, coding]) + struct.pack("<III", P, count, 0) + bytes(20)
    taken, _ = peak(repaired(head + bytes(body) + bytes(4 * count)), P)
    assert taken < 2 * 4 * P
