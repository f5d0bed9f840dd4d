"""Reads published data sets of pixels from their files: CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST.

torchvision defines addresses and checksums, and downloads missing files. They are read here, since CIFAR's files are
pickles, which torchvision would execute. Pixels stay uint8, (N, C, H, W).
"""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.datasets.utils import check_md5, download_and_extract_archive

from fedsparse.core.checks import check_choice
from fedsparse.data.datasets import Dataset, Split, hold_out
from fedsparse.data.files import MOST_BYTES, checked_file, reason_of
from fedsparse.data.unpickle import array_of, number_of, read_pickle

# Mean and standard deviation of each channel over the training images, pixels scaled to [0, 1].
MOMENTS: dict[type, tuple[tuple[float, ...], tuple[float, ...]]] = {
    CIFAR10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    CIFAR100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    MNIST: ((0.1307,), (0.3081,)),
    FashionMNIST: ((0.2860,), (0.3530,)),
}

HALVES = ("a", "b", "all")


def cifar10(root: str | Path = "data", val_fraction: float = 0.1, split_seed: int = 0, part: str = "all") -> Dataset:
    """Load CIFAR-10 (Krizhevsky 2009): 60,000 images of 3 x 32 x 32, ten classes, 10,000 of them to test.

    Args:
        root: folder that holds, or gets, ``cifar-10-batches-py``.
        val_fraction: share of the training images for validation, with the same class mix.
        split_seed: seed of the split, independent of the seed of a run.
        part: ``all``, or one of two halves of the training images that share none, ``a`` or ``b``: one to pre-train
            on, the other to fine-tune on. Both have the class mix of the whole, and depend on ``split_seed``.

    Raises:
        ValueError: files are missing and cannot be downloaded, or are damaged, or there is no such part; one line with
            the remedy.

    """
    check_choice("data.part", part, *HALVES)
    return _cifar(CIFAR10, root, val_fraction, split_seed, part)


def cifar100(root: str | Path = "data", val_fraction: float = 0.1, split_seed: int = 0) -> Dataset:
    """Load CIFAR-100 with its fine labels: 60,000 images of 3 x 32 x 32, a hundred classes, 10,000 of them to test.

    Its folder in ``root`` is ``cifar-100-python``; arguments and errors are those of ``cifar10``.
    """
    return _cifar(CIFAR100, root, val_fraction, split_seed)


def mnist(root: str | Path = "data", val_fraction: float = 0.1, split_seed: int = 0) -> Dataset:
    """Load MNIST (LeCun et al. 1998): 70,000 handwritten digits of 1 x 28 x 28, 10,000 of them to test.

    Its folder in ``root`` is ``MNIST/raw``, of ``.gz`` or plain files; arguments and errors are those of
    ``cifar10``.
    """
    return _mnist(MNIST, root, val_fraction, split_seed)


def fashion_mnist(root: str | Path = "data", val_fraction: float = 0.1, split_seed: int = 0) -> Dataset:
    """Load Fashion-MNIST (Xiao et al. 2017): 70,000 garments of 1 x 28 x 28, ten kinds, 10,000 of them to test.

    Its folder in ``root`` is ``FashionMNIST/raw``, of ``.gz`` or plain files; arguments and errors are those of
    ``cifar10``.
    """
    return _mnist(FashionMNIST, root, val_fraction, split_seed)


def _cifar(published: Any, root: str | Path, val_fraction: float, seed: int, part: str = "all") -> Dataset:
    """Load CIFAR, of one pickled dict a file."""
    folder, parts = place_of(root) / published.base_folder, (published.train_list, published.test_list)
    sums = {folder / name: md5 for part in parts for name, md5 in part}
    if not all(path.exists() for path in sums):
        address = published.url.removesuffix(published.filename)
        fetch({published.filename: published.tgz_md5}, [address], folder.parent)
    warn_of_changes(sums)
    train, test = ([read_batch(folder / name) for name, _ in part] for part in parts)
    labelled = _half(_joined(train), part, seed) if part != "all" else _joined(train)
    return _dataset(published, labelled, _joined(test), val_fraction, seed)


def _half(split: Split, part: str, seed: int) -> Split:
    rows = hold_out(split.y.numpy(), 0.5, seed, "data.part")[HALVES.index(part)]
    return Split(split.held[rows], split.y[rows])


def _mnist(published: Any, root: str | Path, val_fraction: float, seed: int) -> Dataset:
    """Load MNIST, of four files: images and labels of training and of testing."""
    folder = place_of(root) / published.__name__ / "raw"
    missing = {name: md5 for name, md5 in published.resources if not stored(folder / name).exists()}
    fetch(missing, published.mirrors, folder)
    # the published checksums are those of the compressed files
    warn_of_changes({folder / name: md5 for name, md5 in published.resources if (folder / name).exists()})
    paths = [stored(folder / name) for name, _ in published.resources]
    return _dataset(published, read_pair(*paths[:2]), read_pair(*paths[2:]), val_fraction, seed)


def _dataset(published: type, labelled: Split, test: Split, val_fraction: float, seed: int) -> Dataset:
    """Hold validation images out of the training images; the test split is the published one."""
    mean, std = MOMENTS[published]
    indices = hold_out(labelled.y.numpy(), val_fraction, seed)
    train, val = (Split(labelled.held[part], labelled.y[part]) for part in indices)
    classes = 1 + int(torch.cat([labelled.y, test.y]).max())
    return Dataset(train, val, test, classes, published.__name__, mean, std)


def place_of(root: object) -> Path:
    """Return ``data.root`` as a path, which need not exist.

    Raises:
        ValueError: it is no path.

    """
    if not isinstance(root, str | Path):
        raise ValueError(
            f"data.root is {'null' if root is None else root}; give the folder that holds or gets the files"
        )
    return Path(root)


def _joined(batches: Sequence[Split]) -> Split:
    return Split(torch.cat([batch.held for batch in batches]), torch.cat([batch.y for batch in batches]))


def fetch(files: Mapping[str, str], addresses: Sequence[str], folder: Path) -> None:
    """Download files (name: MD5) into a folder, each from the first address that has it, and unpack them there.

    Raises:
        ValueError: a file cannot be downloaded; one line with the remedy.

    """
    failures = {name: failure for name, md5 in files.items() if (failure := _tried(name, md5, addresses, folder))}
    if failures:
        raise ValueError(
            f"{folder} lacks {', '.join(failures)}, and downloading failed ({next(iter(failures.values()))}); put "
            f"{', '.join(failures)} from {addresses[0]} into that folder, or set data.root to where the data is"
        )


def _tried(name: str, md5: str, addresses: Sequence[str], folder: Path) -> str:
    """Download one file; returns the error of the last address, or an empty string."""
    failure = ""
    for address in addresses:
        try:
            download_and_extract_archive(address + name, str(folder), filename=name, md5=md5)
            return ""
        except (OSError, RuntimeError, HTTPException) as error:
            failure = " ".join(str(error).split())
    return failure or "no answer"


def warn_of_changes(sums: Mapping[Path, str]) -> None:
    """Warn, in one line, of files (path: published MD5) that differ from the published ones."""
    if changed := [str(path) for path, md5 in sums.items() if not check_md5(checked_file(path), md5)]:
        warnings.warn(f"not the published checksum: {', '.join(changed)}; used all the same", stacklevel=2)


def read_batch(path: Path) -> Split:
    """Read one of CIFAR's pickles: images (N, 3, 32, 32) and labels, of CIFAR-100 the fine ones.

    Raises:
        ValueError: the file is damaged, is no batch of CIFAR, or holds anything but plain data.

    """
    content = read_pickle(path)
    content = content if isinstance(content, dict) else {}
    images, labels = array_of(content.get("data")), _labels(content.get("fine_labels", content.get("labels")))
    if images is None or images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{path} is no batch of CIFAR; it needs data, uint8 (N, 3072), and N labels from 0 to 99")
    return Split(torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels))


def _labels(held: Any) -> np.ndarray:
    """Convert labels, a list or an array, to int64 (N,); empty if one is no class of CIFAR."""
    array = array_of(held)
    numbers = held if array is None else array.tolist()
    whole = [number_of(number) for number in numbers] if isinstance(numbers, list) else []
    return np.array(whole if all(0 <= number < 100 for number in whole) else [], dtype=np.int64)


def stored(packed: Path) -> Path:
    """Find a compressed file, or else the same uncompressed."""
    return packed if packed.exists() else packed.with_suffix("")


def read_pair(images: Path, labels: Path) -> Split:
    """Read a file of images and the file of their labels.

    Raises:
        ValueError: a file is damaged or of another format.

    """
    return Split(read_idx(images, 3)[:, None], read_idx(labels, 1).long())


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a file of MNIST's format, compressed or not: a magic number, big-endian sizes, then bytes.

    Returns:
        uint8, of ``ndim`` dimensions.

    Raises:
        ValueError: the file is damaged or of another format.

    """
    try:
        with gzip.open(checked_file(path)) if path.suffix == ".gz" else checked_file(path).open("rb") as file:
            if file.read(4) != bytes([0, 0, 8, ndim]):
                raise ValueError(f"it does not begin as {ndim}-dimensional bytes do")
            shape = np.frombuffer(file.read(4 * ndim), ">i4").tolist()
            size = math.prod(shape)
            if len(shape) < ndim or min(shape) < 0 or size > MOST_BYTES:
                raise ValueError(f"it promises {' x '.join(map(str, shape))} bytes")
            content = bytearray(file.read(size))
            # no more is decompressed than its sizes state: a small file may expand without limit
            if len(content) < size or file.read(1):
                raise ValueError(f"it holds {'fewer' if len(content) < size else 'more'} bytes than it promises")
        return (
            torch.frombuffer(content, dtype=torch.uint8).view(shape)
            if content
            else torch.empty(shape, dtype=torch.uint8)
        )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        where = f"{path} is damaged or no IDX file"
        raise ValueError(f"{where} ({reason_of(error)}); delete it, to download it again") from error
