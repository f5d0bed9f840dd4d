"""Converts stored images to a network's inputs: scale, resize, repeat the channel, normalise.

Shapes: ``C`` channels, ``H`` x ``W`` pixels. Computed on the device of the images, a cohort at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fedsparse.core.checks import check_choice
from fedsparse.data.datasets import Dataset

MODES = {name: InterpolationMode(name) for name in ("bicubic", "bilinear", "nearest")}


def unchanged(x: Tensor) -> Tensor:
    """Return images unchanged."""
    return x


@dataclass(frozen=True)
class Inputs:
    """The conversion of images to a network's inputs; ``Inputs()`` returns float images unchanged, without a copy.

    Pixels (uint8) are divided by 255, resized, repeated and normalised. Float images are already standardised: only
    size and channels are adapted. A bicubic resize may slightly leave [0, 1] at hard edges; as in torchvision, float
    values are not clipped.

    Attributes:
        size: side of the network's square input; None: not resized.
        channels: number to which a grey channel is repeated; None: not repeated.
        mean: per channel, of pixels scaled to [0, 1]; empty: not normalised. One number counts for all channels; one
            channel takes the average of three numbers.
        std: per channel, likewise.
        interpolation: bicubic, bilinear or nearest; the first two with antialiasing.
        dtype: of the inputs; None: floats keep theirs, and pixels become float32.
        channels_last: whether a batch (B, C, H, W) lies in memory as (B, H, W, C), which convolutions then keep.

    Raises:
        ValueError: the interpolation is unknown, or mean and std differ in length; when called, the channels are not
            those of the network, nor a single one.

    """

    size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bicubic"
    dtype: torch.dtype | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_choice("interpolation", self.interpolation, *MODES)
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers and std {len(self.std)}; give as many of both")

    def __call__(self, x: Tensor) -> Tensor:
        """Prepare images: (*, C, H, W) -> floats (*, channels, size, size)."""
        fitted = repeated(resized(scaled(x, self.dtype), self.size, self.interpolation), self.channels)
        images = fitted if x.is_floating_point() or not self.mean else normalised(fitted, self.mean, self.std)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else images


@dataclass(frozen=True)
class TokenInputs:
    """The conversion of tokens: none."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return ids (*, L) unchanged."""
        return x


def inputs_for(
    dataset: Dataset,
    wanted: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Inputs | TokenInputs:
    """Build the conversion of a data set's samples to a network's inputs.

    Args:
        dataset: of pixels (uint8), of standardised float images, or of tokens.
        wanted: inputs of the network's pre-training, by timm's keys ``input_size`` (C, H, W), ``mean``, ``std`` and
            ``interpolation`` (a net's ``pretrained_cfg``); None, or a missing key: no requirement.
        dtype: of the network, if it is not float32.
        channels_last: how batches of images lie in memory; see ``Inputs``.

    Raises:
        ValueError: the model takes other channels than a repeated grey, or images that are not square.

    """
    if dataset.tokens:
        return TokenInputs()
    wanted = wanted or {}
    channels, height, width = wanted.get("input_size") or (None, None, None)
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width}; only square ones can be prepared")
    check_channels(dataset.train.x.shape[-3], channels)
    pixels = not dataset.train.x.dtype.is_floating_point
    source = (wanted if wanted.get("mean") else vars(dataset)) if pixels else {}
    mean, std = (tuple(map(float, source.get(key, ()))) for key in ("mean", "std"))
    mode = wanted.get("interpolation") or "bicubic"
    return Inputs(height, channels, mean, std, mode, dtype, channels_last)


def scaled(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Scale pixels of 0 to 255 to [0, 1], in float32 by default; floats keep their values."""
    if x.is_floating_point():
        return x if dtype is None else x.to(dtype)
    return x.to(dtype or torch.float32).div_(255)


def resized(x: Tensor, size: int | None, interpolation: str) -> Tensor:
    """Resize float images to a square: (*, C, H, W) -> (*, C, size, size)."""
    if size is None or x.shape[-2:] == (size, size):
        return x
    square: Tensor = tv.resize(x, [size, size], MODES[interpolation], antialias=True)
    return square


def repeated(x: Tensor, channels: int | None) -> Tensor:
    """Repeat a grey channel, as a view: (*, 1, H, W) -> (*, channels, H, W)."""
    check_channels(x.shape[-3], channels)
    if channels in (None, x.shape[-3]):
        return x
    return x.expand(*x.shape[:-3], channels, *x.shape[-2:])


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel: (*, C, H, W) -> the same shape."""
    mean, std = (per_channel(numbers, x.shape[-3]) for numbers in (mean, std))
    if not all(std):
        raise ValueError(f"std is {list(std)}; images cannot be divided by 0")
    normal: Tensor = tv.normalize(x, *(_numbers(part, x.dtype, x.device) for part in (mean, std)))
    return normal


@cache
@torch.inference_mode(False)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a device once, since a copy in every step would synchronise host and device."""
    return torch.tensor(values, dtype=dtype, device=device)


def per_channel(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Assign numbers to channels; if their counts differ, all channels get the average."""
    return numbers if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels


def check_channels(held: int, wanted: int | None) -> None:
    """Refuse data whose channels are neither as many as the model takes nor a single grey one.

    Raises:
        ValueError: one line with both numbers.

    """
    if wanted not in (None, held) and held != 1:
        raise ValueError(
            f"the model takes images of {wanted} channels and data has {held}; only a single grey channel can be "
            "repeated, so choose a model of as many channels, or other data"
        )
