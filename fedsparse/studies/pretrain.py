"""Make the packaged backbone again: ``python -m fedsparse.studies.pretrain``; ``--help`` lists its options.

A vision transformer learns to name 36 letters, rendered from the fonts that ship with matplotlib and jittered to look
hand-written. No digit is among them, and no image of scikit-learn's digits is trained on: digits are the downstream
task. What is borrowed from that data set: the recipe of its making (32 x 32 bitmaps counted in blocks of 4 x 4), its
two standardisation constants, and, by eye, the width of its strokes and figures. About eight minutes of one core.

Shapes: ``N`` glyphs, ``V`` vertices of an outline.
"""

from __future__ import annotations

import argparse
import math
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
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.core.files import write
from fedsparse.core.signals import command
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
    turn, slant = rng.normal(0, 0.15), rng.normal(0.1, 0.2)
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[np.exp(rng.normal(0, 0.15)), slant], [0, 1]])
    waves, phases = rng.normal(0, 2.5, (3, 2)), rng.uniform(0, 2 * np.pi, 3)
    bends = np.sin(vertices @ waves.T + phases) @ rng.normal(0, 0.1, (3, 2))
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
    stroke = rng.uniform(0, 1) if "Bol" in font or font == "cmb10" else rng.uniform(1.5, 4)
    height = rng.uniform(0.88, 1.0) * SIDE - stroke
    unit = fit(np.asarray(path.vertices), drawn, 2.0, 2.0)
    placed = fit(jitter(unit, rng), drawn, height, rng.uniform(0.55, 0.8) * SIDE - stroke)
    return render(Outline(placed + SIDE / 2 + rng.normal(0, 0.7, 2), codes), stroke, canvas)


def make_glyphs(count: int, rng: Generator) -> Split:
    """Draw ``count`` glyphs, every class alike often, fonts at random: x (count, 1, 8, 8) standardised, y (count,)."""
    canvas = RendererAgg(SIDE, SIDE, 72)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    fonts = rng.integers(len(FONTS), size=count)
    images = [glyph(FONTS[f], CLASSES[y], rng, canvas) for f, y in zip(fonts, labels, strict=True)]
    return Split(scale_pixels(np.stack(images)[:, None]), torch.from_numpy(labels.astype(np.int64)))


def train(net: nn.Module, glyphs: Split, epochs: int, seed: int, rate: float = 2e-3) -> None:
    """Train a net to name glyphs: AdamW, warm-up and a cosine to zero.

    Labels are not smoothed: features trained that way transfer worse (Kornblith et al. 2021, arXiv:2010.16402).

    Args:
        net: (N, 1, 8, 8) -> (N, classes); changed in place.
        glyphs: what it learns.
        epochs: passes over the glyphs.
        seed: decides the order of the batches.
        rate: highest learning rate.

    """
    steps = epochs * -(-len(glyphs.y) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        loss = train_epoch(net, glyphs, optimizer, schedule, generator)
        print(f"epoch {epoch + 1}/{epochs}: loss {loss:.3f}", flush=True)


def rate_share(step: int, steps: int, warmup: float = 0.05) -> float:
    """Share of the highest learning rate at a step: a cosine from 1 to 0 under a line that rises over the warm-up.

    >>> [round(rate_share(step, 100), 2) for step in (0, 4, 50, 99)]
    [0.2, 1.0, 0.5, 0.0]
    """
    return min((step + 1) / max(warmup * steps, 1), (1 + math.cos(math.pi * step / steps)) / 2)


def train_epoch(
    net: nn.Module,
    glyphs: Split,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> float:
    """Take one step for every batch of a new order; returns the mean loss of the batches."""
    total, batches = 0.0, torch.randperm(len(glyphs.y), generator=generator).split(BATCH)
    for batch in batches:
        loss = F.cross_entropy(net(glyphs.x[batch]), glyphs.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / len(batches)


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Share of a split's images that a net names right."""
    return (net(split.x).argmax(1) == split.y).double().mean().item()


@torch.no_grad()
def features(net: VisionTransformer, x: Tensor) -> np.ndarray:
    """Compute what the head of a vision transformer is given: (N, C, H, W) -> (N, width)."""
    return net.forward_head(net.forward_features(x), pre_logits=True).numpy()


def linear_probe(net: VisionTransformer, train: Split, test: Split) -> float:
    """Accuracy on ``test`` of a logistic regression on frozen features, fitted on ``train``."""
    model = LogisticRegression(max_iter=5000).fit(features(net, train.held), train.y.numpy())
    return float(model.score(features(net, test.held), test.y.numpy()))


def backbone(net: nn.Module) -> dict[str, Tensor]:
    """Copy all tensors of a net but those of its head, as float32."""
    held = net.state_dict().items()
    return {name: tensor.float().contiguous() for name, tensor in held if not name.startswith(HEAD)}


def pretrain(epochs: int, glyphs: int, seed: int) -> tuple[VisionTransformer, float]:
    """Render glyphs and train a net on them; returns it and its accuracy on glyphs that it never saw."""
    net = vit_digits(num_classes=len(CLASSES), pretrained=False, seed=seed)
    train(net, make_glyphs(glyphs, np.random.default_rng((seed, 0))), epochs, seed)
    return net.eval(), accuracy(net, make_glyphs(HELD_OUT, np.random.default_rng((seed, 1))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the backbone and print how good it is."""
    parser = argparse.ArgumentParser(description="Make the packaged backbone of vit_digits again.")
    packaged = Path(str(files("fedsparse.models"))) / "weights" / "vit_digits.safetensors"
    parser.add_argument("--out", type=Path, default=packaged, help="the safetensors file to write")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--glyphs", type=int, default=80000, help="glyphs to train on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    net, right = pretrain(options.epochs, options.glyphs, options.seed)
    typed = f"--epochs {options.epochs} --glyphs {options.glyphs} --seed {options.seed}"
    command = f"python -m fedsparse.studies.pretrain {typed}"
    notes = {"command": command, "seed": options.seed, "epochs": options.epochs, "glyph_accuracy": f"{right:.4f}"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write(options.out, save(backbone(net), {key: str(value) for key, value in notes.items()}))
    data = digits()
    probed = linear_probe(net, data.train, data.val)
    print(f"held-out glyphs: {right:.1%}; linear probe on digits, validation: {probed:.1%}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with command():
        main()
