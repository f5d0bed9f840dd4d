"""Mutated messages through what a server reads them with: the right values, an error that names the field, or refused.

50,000 with ``make fuzz``, 70 % of them with a right CRC; a tenth in CI. The child has 64 MB beyond what it begins with,
for messages of at most 3,000 coordinates: what a forged header asks for is not allocated. How much reading takes at the
most is measured in ``test_wire_fuzz.py``: less than two models beside the message.
"""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace

import pytest
import torch
from fuzzing import attempts, hammer
from test_wire_fuzz import DAMAGE, repaired

from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.filters import Quantize
from fedsparse.federation.exchange.sparsifiers import Layers, RandomK, Threshold, TopK
from fedsparse.federation.exchange.update import Payload, Update
from fedsparse.federation.exchange.wire.message import PayloadError

SIZES, HELD, WEIGHT_AT, LOSS_AT = (1, 40, 700, 3000), (10.0, 20.0, 30.0), 24, 32
NUMBERS = (1e308, 1e300, -1.0, 0.0, -0.0, 5e-324, 20.0, 19.5, math.nan, math.inf, -math.inf)


def relie(payload, rng):
    """Weight or loss: another number, of any kind."""
    at = rng.choice((WEIGHT_AT, LOSS_AT))
    number = rng.choice((*NUMBERS, rng.uniform(0, 60), struct.unpack("<d", rng.randbytes(8))[0]))
    return payload[:at] + struct.pack("<d", number) + payload[at + 8 :]


def declare(payload, rng):
    """Buffers that the model does not have, or fewer than it has."""
    (extra,) = struct.unpack_from("<I", payload, 16)
    item = {0: 4, 1: 8, 2: 2, 3: 2}[payload[6]]
    more = rng.choice((-extra, -1, 1, 5))
    if extra + more < 0:
        more = 1
    body = payload[: len(payload) + more * item] if more < 0 else payload + rng.randbytes(more * item)
    return body[:16] + struct.pack("<I", extra + more) + body[20:]


MUTATIONS = [*DAMAGE, relie, relie, declare]


def exchanges(size):
    """Exchanges that write messages, by what is chosen and how it travels."""
    half = {"precision": Quantize("float16")}
    steps = {"precision": Quantize("int8")}
    trained, local = torch.ones(size, dtype=torch.bool), torch.arange(size) % 5 == 4
    nothing = torch.zeros_like(trained)
    made = [
        (Exchange, {"filters": half}),
        (Exchange, {"payload": "value"}),
        (Full, {"filters": steps}),
        (Exchange, {"rule": TopK(fraction=0.1)}),
        (Exchange, {"rule": TopK(fraction=0.01), "filters": steps}),
        (Exchange, {"rule": TopK("largest_final", 0.3, compat="original"), "payload": "value", "compat": "original"}),
        (Exchange, {"rule": RandomK(0.3), "filters": half}),
        (Exchange, {"rule": Threshold(1.0, "largest_final"), "payload": "value"}),
        (Exchange, {"rule": Layers(percentage=1.0)}),
    ]
    return [build(trained, where, **options) for build, options in made for where in (nothing, local)]


def cases():
    """Exchange, what it sends of an update, and what it reads of that unharmed."""
    found = []
    for number, size in enumerate(SIZES):
        g = torch.Generator().manual_seed(number)
        for dtype in (torch.float32, torch.float64):
            for extra in (0, 3):
                rows, start, buffers = (torch.randn(3, n, generator=g).to(dtype) for n in (size, size, extra))
                update = Update((4, 9, 2), rows, buffers, HELD, (0.5, -1.0, 2.0), start=start, round=3)
                for travels in exchanges(size):
                    payload = travels.encode(update)
                    known = replace(update, rows=torch.full_like(rows, math.nan), values=None)  # it sees no rows
                    written = tuple(travels.messages(payload))
                    found.append((travels, Payload(known, payload.sizes, written), travels.decode(payload)))
    return found


def judge(read, right, known, said):
    """What was taken in is finite, of the known shape, and within what is known of the client; others are as ever."""
    assert read.rows.shape == right.rows.shape
    assert read.buffers.shape == known.buffers.shape
    for k in (0, 2):
        assert torch.equal(read.rows[k], right.rows[k])
        assert torch.equal(read.buffers[k], right.buffers[k])
        assert (read.weight[k], read.loss[k]) == (right.weight[k], right.loss[k])
    assert set(read.refused) <= {1}
    weight, loss = struct.unpack_from("<dd", said, WEIGHT_AT)
    if 1 in read.refused:
        assert read.weight[1] == read.loss[1] == 0.0
        assert not read.rows[1].any()
        assert not read.buffers[1].any()
        assert "\n" not in read.refused[1]
        return "refused, and named"
    assert 0 < read.weight[1] == weight <= HELD[1]
    assert read.loss[1] == loss
    assert math.isfinite(loss)
    assert bool(read.rows[1].isfinite().all() & read.buffers[1].isfinite().all())
    assert struct.unpack_from("<I", said, 16)[0] == known.buffers.shape[1]
    return "taken"


@pytest.mark.fuzz
def test_no_mutated_message_is_taken_for_more_than_it_can_be():
    found = cases()

    def attempt(index):
        rng = random.Random(index)
        travels, payload, right = rng.choice(found)
        said = rng.choice(MUTATIONS)(payload.written[1], rng)
        forged = index % 10 < 7
        said = repaired(said) if forged else said
        sent = replace(payload, written=(payload.written[0], said, payload.written[2]))
        try:
            read = travels.decode(sent)
        except PayloadError as error:
            named = str(error).startswith(f"payload {error.field}: ") and "\n" not in str(error)
            return f"field {error.field}" if named else f"unnamed {error}"
        assert forged or said == payload.written[1]  # damage that the CRC would not see
        if said == payload.written[1]:
            assert torch.equal(read.rows, right.rows)
            return "unharmed"
        return judge(read, right, payload.update, said)

    ended = hammer(attempt, attempts(50_000), refusals=(), megabytes=64)
    assert not [word for word in ended if word.startswith("unnamed")]
    fields = {word.removeprefix("field ") for word in ended if word.startswith("field ")}
    assert fields >= {"magic", "version", "dtype", "row dtype", "coding", "size", "count", "length", "crc", "positions"}
    assert ended["taken"] > attempts(50_000) // 100
    assert ended["refused, and named"] > attempts(50_000) // 50
