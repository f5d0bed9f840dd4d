"""Random rotation, mirror images and colour jitter of given strength; AutoFLIP's options.

As in ``fedsparse.data.augment``, they are pure functions of given uniform numbers.

Shapes: ``n`` samples, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fedsparse.core.checks import finite


class Change(Protocol):
    """A random change of images; see ``fedsparse.data.augment.Augment``."""

    @property
    def numbers(self) -> int:
        """Uniform numbers per sample."""

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Change: images (n, C, H, W), float64 (n, numbers) -> (n, C, H, W)."""


class Chain:
    """Several changes in sequence; each uses the next numbers of a sample."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = list(changes)
        self.numbers = sum(change.numbers for change in changes)

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Change each sample by its own numbers."""
        for change, part in zip(self.changes, uniforms.split([c.numbers for c in self.changes], 1), strict=True):
            x = change(x, part)
        return x


class Rotate:
    """Turn by an angle of U(-degrees, degrees), nearest neighbour, filled with 0; torchvision's ``RandomRotation``."""

    numbers = 1

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Turn each sample by its own number."""
        angles = ((2 * uniforms[:, 0] - 1) * self.degrees).tolist()
        return _each(x, lambda image, angle: tv.rotate(image, angle), angles)


class Mirror:
    """Mirror with probability p: columns (``dim`` 3) or rows (``dim`` 2)."""

    numbers = 1

    def __init__(self, p: float, dim: int) -> None:
        self.p, self.dim = p, dim

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Mirror the samples whose number is below p."""
        chosen = (uniforms[:, 0] < self.p).to(x.device)
        return torch.where(chosen[:, None, None, None], x.flip(self.dim), x)


class Jitter:
    """Scale brightness and contrast, each by U(max(0, 1 - s), 1 + s), in random order; torchvision's ``ColorJitter``.

    Only these two, as in AutoFLIP's framework. The numbers of a sample: brightness, contrast, order.
    """

    numbers = 3

    def __init__(self, strength: float) -> None:
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Scale each sample by its own numbers.

        Raises:
            ValueError: the images are not uint8, or have neither 1 nor 3 channels.

        """
        if x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"data.augment.jitter needs pixels, uint8 in 1 or 3 channels, but data holds {x.dtype} in "
                f"{x.shape[1]}; leave jitter out"
            )
        factors = self.low + uniforms[:, :2] * (self.high - self.low)
        return _each(x, _scaled, zip(*factors.T.tolist(), (uniforms[:, 2] < 0.5).tolist(), strict=True))


def _scaled(image: Tensor, factors: tuple[float, float, bool]) -> Tensor:
    """Scale brightness and contrast of one image."""
    brightness, contrast, brightness_first = factors
    steps = [(tv.adjust_brightness, brightness), (tv.adjust_contrast, contrast)]
    for adjust, factor in steps if brightness_first else reversed(steps):
        image = adjust(image, factor)
    return image


def _each(x: Tensor, change: Callable[[Tensor, Any], Tensor], arguments: Any) -> Tensor:
    """Change each image by its own argument, one by one."""
    images = [change(image, argument) for image, argument in zip(x, arguments, strict=True)]
    return torch.stack(images) if images else x


# by option: constructor of the change, largest number, and description of the number
CHANGES: dict[str, tuple[Callable[[float], Change], float, str]] = {
    "rotate": (Rotate, 180, "degrees above 0 and at most 180"),
    "hflip": (lambda p: Mirror(p, 3), 1, "a probability above 0 and at most 1"),
    "vflip": (lambda p: Mirror(p, 2), 1, "a probability above 0 and at most 1"),
    "jitter": (Jitter, math.inf, "a finite number above 0"),
}


def chain(options: Mapping[Any, Any]) -> Chain:
    """Build the changes of ``data.augment``, in the order of ``CHANGES``, which is AutoFLIP's.

    Args:
        options: a number for each of ``rotate``, ``hflip``, ``vflip`` and ``jitter``; missing
            or null: no such change.

    Raises:
        ValueError: a name is unknown, or a number out of range.

    """
    if strange := [name for name in options if name not in CHANGES]:
        raise ValueError(f"data.augment has {strange[0]!r}; choose among {', '.join(CHANGES)}")
    chosen = {name: options[name] for name in CHANGES if options.get(name) is not None}
    for name, value in chosen.items():
        _, most, kind = CHANGES[name]
        if not (finite(value) and 0 < value <= most):
            raise ValueError(f"data.augment.{name} is {value!r}; give {kind}, or leave it out")
    return Chain([CHANGES[name][0](float(value)) for name, value in chosen.items()])
