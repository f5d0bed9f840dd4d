"""Augmentation of training images, a cohort at once, as a pure function of given uniform numbers.

Shapes: ``n`` samples, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as tv

from fedsparse.data.changes import chain

Operation = Callable[[Tensor, int], Tensor]

# of RandAugment: the steps of each operation's range, and the step of all operations
STEPS, MAGNITUDE = 31, 9


class Augment(Protocol):
    """A random change of training images.

    Attributes:
        numbers: uniform numbers in [0, 1) per sample.

    """

    numbers: int

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Augment: images (n, C, H, W), float64 (n, numbers) -> (n, C, H, W), same dtype and device."""


class CropFlip:
    """A random crop out of the zero-padded image, then a mirror image half of the time.

    The padding is 4 for 32 x 32, as is usual for CIFAR (He et al. 2016, section 4.2), and an eighth of the height
    elsewhere, at least 1. The numbers of a sample: row, column, flip.
    """

    numbers = 3

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Crop and flip each sample by its own numbers, in one gather."""
        height, width = x.shape[2:]
        pad = max(1, round(height / 8))
        # computed on the device of the numbers, since x's may lack float64
        shifts = (uniforms[:, :2] * (2 * pad + 1)).long().to(x.device)
        flips = (uniforms[:, 2] < 0.5).to(x.device)
        columns = torch.arange(width, device=x.device)
        rows = torch.arange(height, device=x.device) + shifts[:, :1]
        columns = torch.where(flips[:, None], columns.flip(0), columns) + shifts[:, 1:]
        sample, channel = (torch.arange(count, device=x.device) for count in x.shape[:2])
        place = sample[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]
        return functional.pad(x, (pad, pad, pad, pad))[place]


class RandAugment:
    """Crop and flip, then two of 14 operations on pixels, with replacement, at magnitude 9 (Cubuk et al. 2020).

    Ranges are those of torchvision's ``RandAugment(num_ops=2, magnitude=9)``, nearest-neighbour and filled with black.
    The numbers of a sample: those of CropFlip, then for each operation which one and which sign.
    """

    numbers = CropFlip.numbers + 4

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Augment each sample by its own numbers; samples with equal operation and sign are one batch.

        Raises:
            ValueError: the images are not uint8, or have neither 1 nor 3 channels.

        """
        check_pixels(x)
        x = CropFlip()(x, uniforms)
        for choice, sign in uniforms[:, CropFlip.numbers :].T.split(2):
            x = operate(x, (choice * len(OPERATIONS)).long(), sign < 0.5)
        return x


def check_pixels(x: Tensor) -> None:
    """Refuse images that RandAugment cannot change.

    Raises:
        ValueError: they are not uint8 in 1 or 3 channels; one line with data.augment.

    """
    if x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"data.augment=randaugment needs pixels, uint8 in 1 or 3 channels, but data holds {x.dtype} in "
            f"{x.shape[1]}; use data.augment=crop_flip or none"
        )


def operate(x: Tensor, choices: Tensor, negative: Tensor) -> Tensor:
    """Apply to each sample the operation ``choices`` (n,), with its sign: (n, C, H, W) -> (n, C, H, W)."""
    out, groups = x.clone(), 2 * choices + negative
    for group in groups.unique().tolist():
        where = (groups == group).nonzero()[:, 0].to(x.device)
        out[where] = OPERATIONS[group // 2](x[where], -1 if group % 2 else 1)
    return out


def _affine(x: Tensor, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Shift in pixels, or shear by tangents about the corner."""
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    corner = [0.0, 0.0] if any(shear) else None
    moved: Tensor = tv.affine(x, 0.0, list(shift), 1.0, degrees, center=corner)
    return moved


def _magnitude(limit: float) -> float:
    """Compute the value of step 9 of a range from 0 to ``limit``, in float32, as torchvision does."""
    return float(torch.linspace(0, limit, STEPS)[MAGNITUDE])


def _pixels(side: int) -> int:
    """Compute the pixels of a translation: the range is 150 of 331, as in AutoAugment's space."""
    return int(_magnitude(150 / 331 * side))


SHEAR, ANGLE, FACTOR, THRESHOLD = _magnitude(0.3), _magnitude(30), _magnitude(0.9), 255 * (1 - _magnitude(1))
BITS = 8 - round(_magnitude(4))

# Each takes pixels (n, C, H, W) and a sign, 1 or -1, which the first and the last four ignore.
OPERATIONS: tuple[Operation, ...] = (
    lambda x, sign: x,
    lambda x, sign: _affine(x, shear=(sign * SHEAR, 0.0)),
    lambda x, sign: _affine(x, shear=(0.0, sign * SHEAR)),
    lambda x, sign: _affine(x, shift=(sign * _pixels(x.shape[3]), 0)),
    lambda x, sign: _affine(x, shift=(0, sign * _pixels(x.shape[2]))),
    lambda x, sign: tv.rotate(x, sign * ANGLE),
    lambda x, sign: tv.adjust_brightness(x, 1 + sign * FACTOR),
    lambda x, sign: tv.adjust_saturation(x, 1 + sign * FACTOR),
    lambda x, sign: tv.adjust_contrast(x, 1 + sign * FACTOR),
    lambda x, sign: tv.adjust_sharpness(x, 1 + sign * FACTOR),
    lambda x, sign: tv.posterize(x, BITS),
    lambda x, sign: tv.solarize(x, THRESHOLD),
    lambda x, sign: tv.autocontrast(x),
    lambda x, sign: tv.equalize(x),
)

CHOICES: dict[str, Augment | None] = {"none": None, "crop_flip": CropFlip(), "randaugment": RandAugment()}


def augment(name: str | Mapping[Any, Any]) -> Augment | None:
    """Find the augmentation by name, or build a list of changes (``fedsparse.data.changes``); None for none.

    Raises:
        ValueError: the name is unknown; one line with the valid ones.

    """
    if isinstance(name, Mapping):
        listed = chain(name)
        return listed if listed.numbers else None
    if not isinstance(name, str) or name not in CHOICES:
        some = "{rotate: 15, hflip: 0.5, vflip: 0.5, jitter: 0.5}"
        raise ValueError(f"data.augment is {name!r}; choose one of {', '.join(CHOICES)}, or some of {some}")
    return CHOICES[name]
