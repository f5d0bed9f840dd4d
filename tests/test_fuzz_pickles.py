"""Damaged and forged batches of CIFAR: one line, or pixels and labels; never a signal, and never much memory."""

from __future__ import annotations

import pickle
import pickletools
import random

import numpy as np
import pytest
import torch
from fuzzing import attempts, hammer
from test_pickles import NEVER, array, batch

from fedsparse.data import pixels

MUTATIONS = 20_000
MEGABYTES = 64  # that a batch of 40 kB may take
NUMBERS = [0, 1, 127, 128, 255, 2**16, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**63]


def whole_batches():
    """Batches of four images under every protocol, as Python 2 and 3 wrote them."""
    rng = np.random.default_rng(0)
    held = {
        "batch_label": "training batch 1 of 1",
        "fine_labels": [3, 99, 0, 7],
        "coarse_labels": np.arange(4),
        "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
        "filenames": [f"image_{i}.png" for i in range(4)],
    }
    return [*(pickle.dumps(held, protocol) for protocol in range(5)), batch(array())]


def flipped(content, rng):
    """Change bits; most of a batch is pixels, so the program around them is hit more often than its share."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        out[_place(out, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _place(content, rng):
    return rng.choice((rng.randrange(len(content)), rng.randrange(min(300, len(content))), -1 - rng.randrange(200)))


def set_(content, rng):
    out = bytearray(content)
    out[_place(out, rng)] = rng.choice(
        (0, 1, 127, 128, 255, *b"(.0]}st\x85\x86RbcNoipQ\x81\x82\x95", rng.randrange(256))
    )
    return bytes(out)


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def without(content, rng):
    at = _place(content, rng) % len(content)
    return content[:at] + content[at + rng.choice((1, 2, 8, 100)) :]


def numbered(content, rng):
    """Write another number over four or eight bytes."""
    size = rng.choice((4, 8))
    at, number = _place(content, rng) % len(content), rng.choice(NUMBERS) % 2 ** (8 * size)
    return content[:at] + number.to_bytes(size, "little") + content[at + size :]


def inserted(content, rng):
    """Put steps of something malicious, or of the batch itself, into the program."""
    other = rng.choice([*NEVER.values(), content])[:5000]
    start = rng.randrange(len(other))
    at = _place(content, rng) % len(content)
    return content[:at] + other[start : start + rng.choice((1, 2, 5, 40, 1000))] + content[at:]


def swapped(content, rng):
    """Let two steps of the program change places, so that it stays one."""
    ends = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    steps = [content[a:b] for a, b in zip(ends, ends[1:])]  # noqa: B905
    i, j = rng.randrange(len(steps) - 1), rng.randrange(len(steps) - 1)
    steps[i], steps[j] = steps[j], steps[i]
    return b"".join(steps)


WAYS = (flipped, set_, cut, without, numbered, inserted, swapped)


@pytest.mark.fuzz
def test_a_mutated_batch_is_one_line_or_pixels_and_labels(tmp_path):
    path, whole, before = tmp_path / "batch", whole_batches(), set(vars(pixels))

    def attempt(number):
        rng = random.Random(number)
        path.write_bytes(rng.choice(WAYS)(rng.choice(whole), rng))
        split = pixels.read_batch(path)
        assert split.x.dtype == torch.uint8
        assert split.y.dtype == torch.int64
        assert split.x.shape == (len(split.y), 3, 32, 32)
        assert 0 <= int(split.y.min()) <= int(split.y.max()) < 100
        assert set(vars(pixels)) == before
        return "read"

    ended = hammer(attempt, attempts(MUTATIONS), megabytes=MEGABYTES)
    assert min(ended["read"], ended["refused"]) > attempts(MUTATIONS) // 10, ended  # both ways are met
