"""One's own images: a folder with a folder a class, decoded once and kept as pixels, or whenever asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fedsparse.data.checks import checked_integer
from fedsparse.data.datasets import PARTS, Dataset, Split, hold_out
from fedsparse.data.samples import stamp

# of ImageNet, which most backbones for photographs were pre-trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Files = list[tuple[str, int]]


def imagefolder(
    root: str | Path | None,
    size: int = 224,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    stream: bool = False,
) -> Dataset:
    """Load your own images: ``<root>/train/<class>/*``, and ``val`` and ``test`` beside ``train`` where there are any.

    Without a folder ``train``, the class folders lie in ``root`` itself. Images that test, and then those that
    validate, are held out of the training ones, with the same class mix, unless they have a folder of their own.
    Labels are the places of the class names in alphabetical order. Each image takes 3 x size x size bytes of memory,
    unless ``stream`` leaves it on the disk: then it is decoded whenever a client or a validation needs it.

    Args:
        root: the folder.
        size: the shorter side is resized to so many pixels, and the square in the middle is cut out.
        val_fraction: share of the training images that validate; without a folder ``val``.
        test_fraction: share of all images that test; without a folder ``test``.
        split_seed: decides both, whatever the seed of a run.
        stream: whether to leave the images on the disk.

    Raises:
        ValueError: the folder is missing or lacks classes or images, or a file is no image; names it. With ``stream``
            an image is found damaged when it is first needed.

    """
    size = checked_integer("data.size", size, 1)
    if root is None or not Path(root).is_dir():
        raise ValueError(f"data.root={root} is no folder; set data.root to a folder with a folder of images a class")
    found = find_files(Path(root))
    for part, fraction in (("test", test_fraction), ("val", val_fraction)):
        if part not in found:
            labels = np.array([label for _, label in found["train"]])
            indices = hold_out(labels, fraction, split_seed, f"data.{part}_fraction")
            found["train"], found[part] = ([found["train"][i] for i in chosen] for chosen in indices)
    train, val, test = (read_images(found[part], size, stream=stream) for part in PARTS)
    return Dataset(train, val, test, 1 + int(train.y.max()), str(root), MEAN, STD)


def find_files(root: Path) -> dict[str, Files]:
    """Find the images of every part that has a folder, as (path, label); without ``train``, all of ``root`` trains.

    Raises:
        ValueError: there is no class, a class has no image, or one is not among those to train.

    """
    whole = not has_folders(root / "train")  # a folder "train" of images alone is a class: of locomotives, say
    folders = {"train": root} if whole else {part: root / part for part in PARTS if has_folders(root / part)}
    names = sorted(path.name for path in folders["train"].iterdir() if path.is_dir())
    return {part: labelled(folder, names, every=part == "train") for part, folder in folders.items()}


def has_folders(folder: Path) -> bool:
    """Whether this is a folder with folders in it."""
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def labelled(folder: Path, names: Sequence[str], *, every: bool) -> Files:
    """List the images in class folders, as (path, place of the class in ``names``).

    Args:
        folder: of class folders.
        names: the classes.
        every: whether each class needs an image.

    Raises:
        ValueError: names the class that is empty or not known.

    """
    if not has_folders(folder):
        raise ValueError(f"data.root: {folder} has no folder in it; it needs one for each class, with images")
    found = ImageFolder(folder, allow_empty=True)
    if strange := set(found.classes) - set(names):
        raise ValueError(f"data.root: {folder} has the class {min(strange)}, which has no folder among those to train")
    if every and (empty := set(range(len(names))) - set(found.targets)):
        raise ValueError(f"data.root: {folder / names[min(empty)]} has no image in it; add some, or remove the folder")
    # numbered anew: where a class is missing, torchvision's numbers are others
    places = [names.index(name) for name in found.classes]
    return [(path, places[number]) for path, number in found.samples]


def read_images(files: Files, size: int, *, stream: bool = False) -> Split:
    """Decode images, or leave them on the disk: pixels, uint8 (N, 3, size, size), and labels (N,)."""
    x = ImageFiles([path for path, _ in files], size)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(x if stream else x[torch.arange(len(x))], labels)


class ImageFiles:
    """Images that are decoded when they are gathered, each once however often an index names it.

    Args:
        paths: N files.
        size: of the square that ``read_image`` cuts out.

    """

    dtype = torch.uint8

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size
        self.shape = (len(paths), 3, size, size)

    def __len__(self) -> int:
        """N."""
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Decode images: int64 (*) -> uint8 (*, 3, size, size); a ValueError names a damaged file."""
        x = torch.empty(index.numel(), *self.shape[1:], dtype=self.dtype)
        places: dict[int, int] = {}
        for place, image in enumerate(index.flatten().tolist()):
            first = places.setdefault(image, place)
            x[place] = x[first] if first < place else read_image(self.paths[image], self.size)
        return x.view(*index.shape, *self.shape[1:])

    def stamp(self) -> bytes:
        """Give names, sizes and times of change; which class a file is of, the labels tell."""
        return stamp(self.paths)


def read_image(path: str, size: int) -> Tensor:
    """Decode one image to RGB, resize its shorter side, bicubic, and cut the square in its middle out.

    Returns:
        uint8 (3, size, size).

    Raises:
        ValueError: the file is no image, or a damaged one.

    """
    try:
        with Image.open(path) as file:
            image = tv.resize(file.convert("RGB"), [size], InterpolationMode.BICUBIC)
    except Exception as error:  # decoders raise anything on damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as an image ({reason}); repair or remove it") from error
    return tv.pil_to_tensor(tv.center_crop(image, [size, size]))
