"""Decodes an image file to 8-bit pixels: deeper values are scaled, transparency is composed on white.

Shapes: ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fedsparse.data.files import checked_file, printable, reason_of

# Pillow would try all its formats, of which some run other programs (EPS).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
BITS, INVERTED = 258, 262  # TIFF's tags: bits of a sample; 0: white is zero
KINDS = {"I": "32-bit whole numbers", "F": "floating-point numbers"}


def read_image(path: str, size: int) -> Tensor:
    """Decode one image to RGB, resize its shorter side, bicubic, and crop the central square.

    It equals torchvision's ``ImageFolder`` with two exceptions: grey values of 16 bits are scaled to 8 (v / 257,
    rounded; of deep colours Pillow takes the high byte), and transparency is composed on white. Of an animation the
    first picture is read; EXIF orientation is ignored.

    Args:
        path: of a file of at most ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, so that it takes 1.5 GB at most.
        size: of the square.

    Returns:
        uint8 (3, size, size).

    Raises:
        ValueError: the file is no image, a damaged one, too large, has several pages, or is of another depth.

    """
    place = checked_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of damaged metadata, which name no file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(place, formats=FORMATS) as file:
                image = tv.resize(rgb(file), [size], InterpolationMode.BICUBIC)
        return tv.pil_to_tensor(tv.center_crop(image, [size, size]))
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(
            f"{printable(path)} cannot be read as an image ({reason_of(error)}); repair or remove it"
        ) from error


def rgb(file: Image.Image) -> Image.Image:
    """Convert an opened image to RGB of 8 bits.

    Raises:
        ValueError: it has several pages, or values of unknown range.

    """
    if file.format == "TIFF" and getattr(file, "n_frames", 1) > 1:
        raise ValueError("it has several pages; save the one that counts")
    if file.mode in SIXTEEN or (file.mode == "I" and file.format in ("PNG", "PPM")):
        return sixteen_bits(file).convert("RGB")
    if file.mode in KINDS:
        raise ValueError(f"it is of {KINDS[file.mode]}, whose range is not known; save it with 8 or 16 bits")
    if not file.has_transparency_data:
        return file.convert("RGB")
    white = Image.new("RGBA", file.size, "white")
    white.alpha_composite(file.convert("RGBA"))
    return white.convert("RGB")


def sixteen_bits(file: Image.Image) -> Image.Image:
    """Scale grey values of 0 to 65535 to 0 to 255; the transparent value becomes white.

    Raises:
        ValueError: a TIFF has fewer bits, or 0 as white, neither of which Pillow converts.

    """
    tags = getattr(file, "tag_v2", {})
    if tags.get(BITS, (16,)) != (16,) or tags.get(INVERTED) == 0:
        raise ValueError("it is of fewer than 16 bits, or white is its zero; save it with 8 or 16 bits, black as zero")
    values = np.asarray(file).astype(np.uint32)
    levels = ((values + 128) // 257).astype(np.uint8)
    levels[values == file.info.get("transparency", -1)] = 255
    return Image.fromarray(levels)
