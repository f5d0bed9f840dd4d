"""Reads torch's map-style data sets of pairs (x, y) into the splits of a federation.

Shapes: ``N`` samples, ``C`` channels, ``H`` x ``W`` pixels, ``L`` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset
from torchvision.transforms.v2 import functional as tv

from fedsparse.data.datasets import PARTS, Dataset, Split, hold_out
from fedsparse.data.decode import rgb
from fedsparse.data.files import reason_of


def from_torch(
    train: TorchDataset[Any],
    val: TorchDataset[Any] | None = None,
    test: TorchDataset[Any] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """Read torch's data sets into memory, each sample once, in order: a transform that draws at random draws once.

    A sample is a pair (x, y). An x is a PIL image, which becomes pixels (uint8; one channel if it is grey, else three),
    or a tensor or array (C, H, W), (H, W) for one channel, or (L,) of tokens; floats are taken as they are. A y is the
    number of a class, from 0 on; there are as many classes as the highest of all splits says. Test samples, then
    validation samples, are held out of those to train, with the same class mix, where there is no set of them.

    Args:
        train: the training set.
        val: the validation set.
        test: the test set.
        val_fraction: share of training samples for validation, without ``val``.
        test_fraction: share of all samples for testing, without ``test``.
        split_seed: seed of both splits, independent of the seed of a run.

    Raises:
        ValueError: a set is not map-style, or a sample cannot be read, is no such pair, or differs in shape or type
            from the first one; one line.

    """
    sets = {"train": train, "val": val, "test": test}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(split_seed)  # so that a resume reads what random transforms drew before
        found = {part: read_pairs(data, part) for part, data in sets.items() if data is not None}
    for part, fraction in (("test", test_fraction), ("val", val_fraction)):
        if part not in found:
            split = found["train"]
            kept = [torch.from_numpy(i) for i in hold_out(split.labels, fraction, split_seed, f"{part}_fraction")]
            found["train"], found[part] = (Split(split.held[index], split.y[index]) for index in kept)
    classes = 1 + max(int(split.y.max()) for split in found.values())
    return Dataset(found["train"], found["val"], found["test"], classes, type(train).__name__)


def sets_of(returned: Any) -> tuple[Any, Any, Any] | None:
    """Order what a function returned: one data set, (train, val, test), or a mapping by these names.

    Returns:
        The training, validation and test set, None for one that is missing; or None if it is none of these.

    """
    if isinstance(returned, tuple) and len(returned) == len(PARTS):
        returned = dict(zip(PARTS, returned, strict=True))
    named = returned if isinstance(returned, Mapping) else {"train": returned}
    whole = "train" in named and set(named) <= set(PARTS)
    if not whole or not all(isinstance(data, TorchDataset) for data in named.values()):
        return None
    return named["train"], named.get("val"), named.get("test")


def read_pairs(data: Any, part: str) -> Split:
    """Read all samples of a map-style data set.

    Raises:
        ValueError: as ``from_torch``.

    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ValueError(f"the {part} set is a {type(data).__name__}, without a length; it needs to be map-style")
    if not len(data):
        raise ValueError(f"the {part} set is empty; it needs at least one sample")
    x, y = torch.empty(0), torch.empty(len(data), dtype=torch.int64)
    for index in range(len(data)):
        image, y[index] = read_pair(data, index, part)
        if index == 0:
            x = torch.empty(len(data), *image.shape, dtype=image.dtype)
        if (image.shape, image.dtype) != (x.shape[1:], x.dtype):
            raise ValueError(
                f"sample {index} of the {part} set is {image.dtype} {tuple(image.shape)} and sample 0 {x.dtype} "
                f"{tuple(x.shape[1:])}; a transform of the data set has to bring all to one shape"
            )
        x[index] = image
    return Split(x, y)


def read_pair(data: Any, index: int, part: str) -> tuple[Tensor, Tensor]:
    """Read one sample: x as a tensor (C, H, W) or (L,), and its label ().

    Raises:
        ValueError: as ``from_torch``.

    """
    try:
        image, label = data[index]
        if isinstance(image, Image.Image):
            image = tv.pil_to_tensor(image if image.mode == "L" else rgb(image))
        x, y = torch.as_tensor(image), torch.as_tensor(label)
    except Exception as error:  # it runs a user's code, which may raise anything
        raise ValueError(
            f"sample {index} of the {part} set cannot be read as a pair (x, y) ({reason_of(error)})"
        ) from error
    if y.ndim or y.is_floating_point():
        raise ValueError(
            f"sample {index} of the {part} set has the label {label!r}; it needs to be the number of a class"
        )
    return x[None] if x.ndim == 2 else x, y
