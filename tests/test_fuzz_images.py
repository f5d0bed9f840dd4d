"""Damaged and forged image files: one line, or pixels of the right shape; never a signal, and never much memory."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from fuzzing import attempts, hammer
from PIL import Image

from fedsparse.data.decode import read_image

MUTATIONS = 500
MEGABYTES = 1536  # an image of the most pixels, as it is stored, with its colours, on white, and as RGB
FIELDS = (0, 1, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**32 - 1)


def whole_images():
    """Small images of every format in the ways that it stores them."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (13, 17, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 2**16, (13, 17), dtype=np.uint16))
    grey, palette = colour.convert("L"), colour.convert("RGB").convert("P")
    ways = [
        *((image, "PNG", {}) for image in (colour, deep, grey, palette, colour.convert("1"), colour.convert("LA"))),
        *((colour.convert(mode), "JPEG", {}) for mode in ("RGB", "L", "CMYK")),
        (colour.convert("RGB"), "JPEG", {"progressive": True}),
        *((image, "TIFF", {}) for image in (colour, deep, grey, colour.convert("CMYK"))),
        *(
            (colour.convert("RGB"), "TIFF", {"compression": way})
            for way in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (palette, "GIF", {"transparency": 3}),
        (palette, "GIF", {"save_all": True, "append_images": [palette]}),
        *((image, "BMP", {}) for image in (colour, colour.convert("RGB"), palette, colour.convert("1"))),
        (colour, "WEBP", {"lossless": True}),
        (grey, "PPM", {}),
    ]
    return [_saved(*way) for way in ways]


def _saved(image, kind, options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def mutated(content, rng):
    """Change bits, bytes, numbers or the length; headers more often than their share."""
    out = bytearray(content)
    at = rng.randrange(rng.choice((len(out), min(64, len(out)))))
    way = rng.choice(("flip", "byte", "number", "cut", "drop", "repeat", "extend"))
    if way == "flip":
        for _ in range(rng.choice((1, 1, 3, 20))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif way == "byte":
        out[at] = rng.choice((0, 1, 127, 128, 255))
    elif way == "number":
        size, order = rng.choice((2, 4)), rng.choice(("little", "big"))
        out[at : at + size] = (rng.choice(FIELDS) % 2 ** (8 * size)).to_bytes(size, order)
    elif way == "cut":
        del out[at:]
    elif way == "drop":
        del out[at : at + rng.choice((1, 2, 7, 40))]
    elif way == "repeat":
        out[at:at] = out[at : at + rng.choice((1, 8, 100))]
    else:
        out += rng.randbytes(rng.choice((1, 100)))
    return bytes(out)


@pytest.mark.fuzz
def test_a_mutated_image_is_one_line_or_pixels(tmp_path):
    path, whole = tmp_path / "image", whole_images()
    for content in whole:
        path.write_bytes(content)
        assert read_image(str(path), 8).shape == (3, 8, 8)

    def attempt(number):
        rng = random.Random(number)
        path.write_bytes(mutated(rng.choice(whole), rng))
        try:
            x = read_image(str(path), 8)
        except ValueError as error:
            if "MemoryError" in str(error):
                pytest.fail(str(error))
            raise
        assert x.dtype == torch.uint8
        assert x.shape == (3, 8, 8)
        return "read"

    ended = hammer(attempt, attempts(MUTATIONS), megabytes=MEGABYTES)
    assert min(ended["read"], ended["refused"]) > attempts(MUTATIONS) // 10, ended  # both ways are met
