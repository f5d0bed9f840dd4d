"""A user's images: a folder with one folder a class, decoded once into memory, or whenever gathered."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from fedsparse.data.checks import checked_integer
from fedsparse.data.datasets import PARTS, Dataset, Split, hold_out
from fedsparse.data.decode import read_image
from fedsparse.data.files import checked_root, printable
from fedsparse.data.samples import stamp

log = logging.getLogger("fedsparse")

# of ImageNet, the pre-training data of most backbones for photographs
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# usual folder names of each part, in any case: those of Hugging Face's datasets
WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
LEFTOVERS = ("__MACOSX", "__pycache__", "@eaDir")  # folders created by other programs; hidden ones begin with a dot

Files = list[tuple[str, int]]


def imagefolder(
    root: str | Path | None,
    size: int | None = 224,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    stream: bool = False,
) -> Dataset:
    """Load a user's images: ``<root>/train/<class>/*``, and optionally ``val`` and ``test`` beside ``train``.

    Other usual names of the parts are accepted (``WORDS``); a line of the log lists the folders. Without a folder
    ``train``, the class folders lie in ``root`` itself. Test images, then validation images, are held out of the
    training images, with the same class mix, unless they have a folder. Labels are indices of the class names in
    alphabetical order; hidden files and folders are left out. Each image takes 3 x size x size bytes of memory; with
    ``stream`` it stays on the disk and is decoded whenever it is gathered, by ``fedsparse.data.decode.read_image``.

    Args:
        root: the folder.
        size: side of the images in pixels, after resizing and cropping; None is refused, and says that the model takes
            no images of a folder.
        val_fraction: share of training images for validation, without a folder ``val``.
        test_fraction: share of all images for testing, without a folder ``test``.
        split_seed: seed of both splits, independent of the seed of a run.
        stream: whether to leave the images on the disk.

    Raises:
        ValueError: the folder is missing, ambiguous, or lacks classes or images, or a file is no image; one line. With
            ``stream`` a damaged image is found when it is first gathered.

    """
    place = checked_root(root, "a folder with a folder of images a class")
    if size is None:
        raise ValueError(
            "data.size is null, because this model takes no images of a folder (model.image_side is null): choose "
            "model=timm model.name=<a net of timm>, to whose size they are brought, or model=conv data.size=32"
        )
    side = checked_integer("data.size", size, 1)
    folders = find_parts(place)
    names = [path.name for path in subfolders(folders["train"])]
    found = {part: labelled(folder, names, every=part == "train") for part, folder in folders.items()}
    cut = {part: fraction for part, fraction in (("test", test_fraction), ("val", val_fraction)) if part not in found}
    for part, fraction in cut.items():
        labels = np.array([label for _, label in found["train"]])
        indices = hold_out(labels, fraction, split_seed, f"data.{part}_fraction")
        found["train"], found[part] = ([found["train"][i] for i in chosen] for chosen in indices)
    _say(folders, found, names)
    train, val, test = (read_images(found[part], side, stream=stream) for part in PARTS)
    return Dataset(train, val, test, len(names), str(root), MEAN, STD)


def find_parts(root: Path) -> dict[str, Path]:
    """Find the folder of class folders of every part; without part folders, ``root`` is that of ``train``.

    Raises:
        ValueError: there is no class, or parts and classes are mixed.

    """
    parts = [(part, folder) for folder in subfolders(root) if subfolders(folder) and (part := part_of(folder))]
    found = dict(reversed(parts))
    for part, folder in parts:
        if folder != found[part]:
            names = f"{printable(found[part].name)} and {printable(folder.name)}"
            raise ValueError(f"data.root: {root} has both {names}; leave one of them, so that it is clear what counts")
    if not found:
        if not subfolders(root):
            raise ValueError(f"data.root: {root} has no folder in it; it needs one for each class, with images")
        return {"train": root}
    if "train" not in found:
        raise ValueError(f"data.root: {root} has {printable(parts[0][1].name)} but no train; call the third part so")
    for folder in subfolders(root):
        if folder not in found.values() and next(images_in(folder), None):
            raise ValueError(
                f"data.root: {root} has {printable(folder.name)} with images beside {printable(found['train'].name)}; "
                "it needs parts alone (train, val, test, each with class folders), or classes alone"
            )
    return {part: _unwrapped(part, folder) for part, folder in found.items()}


def part_of(folder: Path) -> str | None:
    """Find the part of a data set that a folder's name stands for, if any."""
    return next((part for part, words in WORDS.items() if folder.name.lower() in words), None)


def _unwrapped(part: str, folder: Path) -> Path:
    """Descend into ``train/train``, a usual result of unpacking archives."""
    inner = subfolders(folder)
    alone = len(inner) == 1 and part_of(inner[0]) == part and subfolders(inner[0])
    return _unwrapped(part, inner[0]) if alone else folder


def subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder by name, without hidden ones and ``LEFTOVERS``."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in folders if not path.name.startswith(".") and path.name not in LEFTOVERS]


def labelled(folder: Path, names: Sequence[str], *, every: bool) -> Files:
    """List the images in class folders, as (path, index of the class in ``names``).

    Args:
        folder: of class folders.
        names: the classes.
        every: whether each class needs an image.

    Raises:
        ValueError: a class is empty or unknown; one line with its name.

    """
    files: Files = []
    for place in subfolders(folder):
        if place.name not in names:
            where = f"{printable(folder)} has the class {printable(place.name)}"
            raise ValueError(f"data.root: {where}, which has no folder among those to train")
        found = sorted(images_in(place))
        if every and not found:
            raise ValueError(f"data.root: {printable(place)} has no image in it; add some, or remove the folder")
        label = names.index(place.name)
        files += [(os.path.join(*file), label) for file in found]
    return files


def images_in(folder: Path) -> Iterator[tuple[str, str]]:
    """Find the images of a class at any depth, as (folder, name); sorted, they are in torchvision's order.

    Raises:
        ValueError: a link leads to a folder that was visited before.

    """
    seen = set[tuple[int, int]]()
    for place, inner, names in os.walk(folder, followlinks=True):
        known = os.stat(place)
        if (known.st_dev, known.st_ino) in seen:
            raise ValueError(f"data.root: {printable(place)} is a link to a folder whose images count already")
        seen.add((known.st_dev, known.st_ino))
        inner[:] = [name for name in inner if not name.startswith(".") and name not in LEFTOVERS]
        yield from ((place, n) for n in names if n.lower().endswith(IMG_EXTENSIONS) and not n.startswith("."))


def _say(folders: Mapping[str, Path], found: Mapping[str, Files], names: Sequence[str]) -> None:
    """Log the parts, their folders and numbers of images, and the classes."""
    parts = [f"{part} {len(found[part])} from {printable(folders.get(part, 'those to train'))}" for part in PARTS]
    listed = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
    log.info("images: %s; %d classes: %s", ", ".join(parts), len(names), listed)


def read_images(files: Files, size: int, *, stream: bool = False) -> Split:
    """Decode images, or leave them on the disk: pixels, uint8 (N, 3, size, size), and labels (N,)."""
    x = ImageFiles([path for path, _ in files], size)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(x if stream else x[torch.arange(len(x))], labels)


class ImageFiles:
    """Images that are decoded when gathered, each once for repeated indices.

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
        """Names, sizes and modification times of the files."""
        return stamp(self.paths)
