"""Image files as pixels: depths, transparency and what is refused, against numbers worked out by hand."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fedsparse.data.decode import read_image

RAMP = np.arange(256, dtype=np.uint16)  # 16 x 16 levels, each 257 apart as 16 bits


def grey(path, size=16):
    """The one value of each pixel of an image that has no colour."""
    x = read_image(str(path), size)
    assert x.dtype == torch.uint8
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[0], x[2])
    return x[0].numpy()


def refused(path, says, size=16):
    with pytest.raises(ValueError, match=says) as error:
        read_image(str(path), size)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def tiff(path, content, bits, zero=1, kind=1, side=4, order="<"):
    """A TIFF as a camera may write it: of so many bits, in either order of bytes, with white or black as zero."""
    tags = [(256, side), (257, side), (258, bits), (259, 1), (262, zero), (277, 1), (339, kind)]
    entries = [struct.pack(f"{order}HHIHxx", tag, 3, 1, value) for tag, value in tags]
    entries += [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in ((273, 8), (279, len(content)))]
    held = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(content)) + content
    path.write_bytes(held + struct.pack(f"{order}H", len(entries)) + b"".join(sorted(entries)) + bytes(4))
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(tmp_path, suffix):
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray((RAMP * 257).reshape(16, 16)).save(path)
    assert grey(path).reshape(-1).tolist() == list(range(256))
    # between two levels the nearer one counts: 128 of 257 down, 129 up
    near = np.array([0, 128, 129, 257 * 9 + 128, 257 * 9 + 129, 65535 - 129, 65535 - 128, 65535], np.uint16)
    Image.fromarray(near.repeat(8).reshape(8, 8)).save(path)
    assert grey(path, 8)[:, 0].tolist() == [0, 0, 1, 9, 10, 254, 255, 255]


def test_other_files_of_16_bits(tmp_path):
    for order in "<>":
        ramp = tiff(tmp_path / "ramp.tif", (RAMP * 257).astype(f"{order}u2").tobytes(), 16, side=16, order=order)
        assert grey(ramp).reshape(-1).tolist() == list(range(256))
    pgm = tmp_path / "ramp.pgm"
    pgm.write_bytes(b"P5 16 16 65535\n" + (RAMP * 257).astype(">u2").tobytes())
    assert grey(pgm).reshape(-1).tolist() == list(range(256))
    pgm.write_bytes(b"P5 16 16 1023\n" + (RAMP * 4).astype(">u2").tobytes())  # ten bits, of which 1023 is white
    assert grey(pgm).reshape(-1).tolist() == np.rint(RAMP.astype(int) * 4 * 255 / 1023).astype(int).tolist()


def test_two_classes_that_differ_in_their_low_half_only_stay_apart(tmp_path):
    for name, low in (("a", 300), ("b", 30_000)):
        Image.fromarray(np.full((4, 4), low, np.uint16)).save(tmp_path / f"{name}.png")
    assert [int(grey(tmp_path / f"{name}.png", 4)[0, 0]) for name in "ab"] == [1, 117]


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), "floating-point numbers, whose range is not known"),
        (np.arange(64, dtype=np.int32), "32-bit whole numbers"),
    ],
)
def test_depths_without_a_scale_are_refused(tmp_path, pixels, says):
    Image.fromarray(pixels.reshape(8, 8)).save(tmp_path / "deep.tif")
    refused(tmp_path / "deep.tif", says)


def test_tiffs_that_pillow_hands_on_unscaled_are_refused(tmp_path):
    values = np.arange(16, dtype="<u2")
    assert grey(tiff(tmp_path / "a.tif", (values * 4369).tobytes(), 16), 4).reshape(-1).tolist() == list(
        range(0, 256, 17)
    )
    refused(tiff(tmp_path / "b.tif", bytes(24), 12), "fewer than 16 bits")
    refused(tiff(tmp_path / "c.tif", values.tobytes(), 16, zero=0), "white is its zero")
    refused(tiff(tmp_path / "d.tif", values.tobytes(), 16, kind=2), "whole numbers")  # signed


def test_colours_of_16_bits_are_the_high_byte(tmp_path):
    """Pillow has no deeper colour: each level is the nearest or the one below."""
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.tobytes() for row in (RAMP * 257).astype(">u2").repeat(3).reshape(16, -1))
    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert grey(tmp_path / "deep.png").reshape(-1).tolist() == list(range(256))


def test_what_is_transparent_lies_on_white(tmp_path):
    """A black glyph on nothing: under torchvision all is black."""
    glyph = np.zeros((4, 4, 4), np.uint8)
    glyph[1:3, :, 3] = (255, 255, 128, 0)
    wanted = np.full((4, 4), 255)
    wanted[1:3, :3] = (0, 0, 127)
    rgba = Image.fromarray(glyph)
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    rgba.save(tmp_path / "lossless.webp", lossless=True)
    rgba.save(tmp_path / "rgba.tif")
    for name in ("rgba.png", "la.png", "lossless.webp", "rgba.tif"):
        assert np.abs(grey(tmp_path / name, 4) - wanted).max() <= 1
        assert grey(tmp_path / name, 4)[0, 0] == 255
        assert grey(tmp_path / name, 4)[1, 0] == 0


def test_a_transparent_colour_is_white(tmp_path):
    levels = np.array([[0, 1], [1, 200]], np.uint8)
    palette = Image.fromarray(levels, "P")
    palette.putpalette(sum(([i, i, i] for i in range(256)), []))
    palette.save(tmp_path / "p.png", transparency=1)
    Image.fromarray(levels).save(tmp_path / "l.png", transparency=1)
    Image.fromarray(levels.repeat(3).reshape(2, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 1, 1))
    palette.save(tmp_path / "p.gif", transparency=1)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png", transparency=257)
    for name in ("p.png", "l.png", "rgb.png", "p.gif", "deep.png"):
        assert grey(tmp_path / name, 2).tolist() == [[0, 255], [255, 200]], name


def test_modes_that_hold_colours_otherwise(tmp_path):
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    image = Image.fromarray(red)
    for mode, name in (("P", "p.png"), ("CMYK", "cmyk.tif"), ("CMYK", "cmyk.jpg"), ("RGBX", "x.tif")):
        image.convert(mode).save(tmp_path / name)
        assert np.abs(read_image(str(tmp_path / name), 4).numpy().transpose(1, 2, 0) - red.astype(int)).max() <= 2, name
    bits = np.eye(4, dtype=bool)
    for name in ("bit.png", "bit.tif", "bit.bmp"):
        Image.fromarray(bits).save(tmp_path / name)
        assert grey(tmp_path / name, 4).tolist() == (bits * 255).tolist(), name
    Image.frombytes("LAB", (4, 4), bytes([136, 0, 0] * 16)).save(tmp_path / "lab.tif")  # L* = 53.3: middle grey
    assert np.abs(grey(tmp_path / "lab.tif", 4).astype(int) - 127).max() <= 2


def test_pages_and_animations(tmp_path):
    pages = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (10, 200)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "pages.tif", "several pages")
    for name in ("moves.gif", "moves.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert (grey(tmp_path / name, 4) == 10).all()


def test_orientation_is_left_as_torchvision_leaves_it(tmp_path):
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    Image.fromarray(levels).save(tmp_path / "turned.png", exif=exif)
    assert grey(tmp_path / "turned.png", 4).tolist() == levels.tolist()


def test_large_and_foreign_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(np.zeros((11, 10), np.uint8)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(tmp_path / "bomb.png", r"110 pixels\) exceeds limit of 100")
    monkeypatch.undo()
    # PostScript is a program, which Pillow lets Ghostscript run
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refused(tmp_path / "a.png", "cannot identify")


def test_truncated_images_and_links_are_refused(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "whole.png")
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut{name}").write_bytes(whole[: len(whole) - 40])
        refused(tmp_path / f"cut{name}", "repair or remove it")
    (tmp_path / "loop.png").symlink_to("loop.png")
    refused(tmp_path / "loop.png", "link to nothing")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    refused(tmp_path / "gone.png", "link to nothing")
    (tmp_path / "link.png").symlink_to("whole.png")
    assert grey(tmp_path / "link.png").reshape(-1).tolist() == list(range(256))
