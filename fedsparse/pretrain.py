"""Make the packaged backbone again: ``python -m fedsparse.pretrain [--out FILE] [--epochs 40] [--glyphs 30000] [--seed 0]``.

A vision transformer learns to name 36 letters, rendered from the fonts that ship with matplotlib and jittered to look
hand-written. No digit is among them, and no image of scikit-learn's digits is trained on or chosen by: digits are the
downstream task. Two things are borrowed from that data set: the recipe of its making (32 x 32 bitmaps counted in blocks
of 4 x 4) and its two standardisation constants. Strokes were set to about its width by eye. About five minutes on two cores.

Shapes: ``N`` glyphs, ``V`` vertices of an outline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.transforms import IdentityTransform
from numpy.random import Generator
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.data.datasets import Split, digits, scale_pixels
from fedsparse.models.vision import HEAD, vit_digits

# No digits, and no I, O, i, l or o, which fonts draw like 1 and 0. Small letters only where their shape is their own.
CLASSES = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghjnqrt"
FONTS = (
    *(f"DejaVu{f}" for f in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")),
    *(f"DejaVu{f}" for f in ("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique")),
    *(f"DejaVu{f}" for f in ("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")),
    *(f"STIXGeneral{f}" for f in ("", "Bol", "BolIta", "Italic")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
SIDE, BLOCK = 32, 4
BATCH = 256
HELD_OUT = 3000


@cache
def outline(font: str, character: str) -> Outline:
    """Look up a character's outline in one of matplotlib's own fonts."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    return TextPath((0, 0), character, size=SIDE, prop=FontProperties(fname=str(file)))


def jitter(vertices: np.ndarray, rng: Generator) -> np.ndarray:
    """Turn, slant, stretch and bend an outline (V, 2) of about unit size around the origin."""
    turn, slant = rng.normal(0, 0.13), rng.normal(0.1, 0.2)
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[np.exp(rng.normal(0, 0.15)), slant], [0, 1]])
    waves, phases = rng.normal(0, 2.5, (3, 2)), rng.uniform(0, 2 * np.pi, 3)
    bends = np.sin(vertices @ waves.T + phases) @ rng.normal(0, 0.06, (3, 2))
    return (vertices + bends) @ matrix.T


def fit(vertices: np.ndarray, drawn: np.ndarray, height: float, width: float) -> np.ndarray:
    """Centre an outline (V, 2) on the origin and scale it to a height, or to less where it would be too wide.

    Args:
        vertices: the outline.
        drawn: bool (V,), vertices that count; the one that closes a polygon does not.
        height: wanted height.
        width: largest width.

    """
    low, high = vertices[drawn].min(0), vertices[drawn].max(0)
    extent = np.maximum(high - low, 1e-6)
    scale = np.array([min(height / extent[1], width / extent[0]), height / extent[1]])
    return (vertices - (low + high) / 2) * scale


def render(path: Outline, stroke: float, canvas: RendererAgg) -> np.ndarray:
    """Draw an outline, filled and stroked, and count its ink in blocks: (8, 8) of 0 to 16, as the digits were made.

    Args:
        path: outline in pixels of the canvas.
        stroke: width of the pen that follows the outline, in pixels; 0 leaves the font's own weight.
        canvas: a square canvas of 32 x 32 pixels, cleared first.

    """
    canvas.clear()
    pen = canvas.new_gc()
    pen.set_linewidth(stroke)
    pen.set_joinstyle("round")
    canvas.draw_path(pen, path, IdentityTransform(), (0.0, 0.0, 0.0, 1.0))
    ink = np.asarray(canvas.buffer_rgba())[..., 3] / 255
    return np.round(ink.reshape(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK).sum((1, 3)))


def glyph(font: str, character: str, rng: Generator, canvas: RendererAgg) -> np.ndarray:
    """Render one jittered character: (8, 8) of 0 to 16."""
    path = outline(font, character)
    codes = np.asarray(path.codes)
    drawn = codes != Outline.CLOSEPOLY
    stroke = rng.uniform(0, 3.5)
    height = rng.uniform(0.88, 1.0) * SIDE - stroke
    unit = fit(np.asarray(path.vertices), drawn, 2.0, 2.0)
    placed = fit(jitter(unit, rng), drawn, height, rng.uniform(0.65, 0.85) * SIDE - stroke)
    return render(Outline(placed + SIDE / 2 + rng.normal(0, 0.7, 2), codes), stroke, canvas)


def make_glyphs(count: int, rng: Generator) -> Split:
    """Draw ``count`` glyphs, every class and font alike often: x (count, 1, 8, 8) standardised, y (count,)."""
    canvas = RendererAgg(SIDE, SIDE, 72)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    fonts = rng.integers(len(FONTS), size=count)
    images = [glyph(FONTS[f], CLASSES[y], rng, canvas) for f, y in zip(fonts, labels, strict=True)]
    return Split(scale_pixels(np.stack(images)[:, None]), torch.from_numpy(labels.astype(np.int64)))
