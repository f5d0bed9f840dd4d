"""Images that stay on the disk until they are gathered.

Shapes: ``N`` samples, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsparse.data.files import checked_file, reason_of


class Samples(Protocol):
    """A split's ``x`` on the disk: the part of a tensor's interface that gathering needs."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, C, H, W)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of gathered samples."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Gather samples on the CPU: int64 (*) -> (*, C, H, W); a ValueError names a damaged file."""

    def stamp(self) -> bytes:
        """Identify the samples, and changes of them, without reading them."""


class Mapped:
    """The images of an ``.npy`` file, of which only gathered samples are read.

    Args:
        path: file of numbers (N, C, H, W), or (N, H, W) for one channel. uint8 are kept as pixels, other types become
            float32.

    Raises:
        ValueError: the file cannot be mapped; on gathering, an image has NaN or infinite pixels, since an earlier check
            would read the whole file.

    """

    def __init__(self, path: Path) -> None:
        self.path, self.array = path, read_npy(path, mapped=True)

    def __reduce__(self) -> Any:
        """Pickle the path only; numpy would pickle the whole array."""
        return Mapped, (self.path,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        shape = self.array.shape
        return shape if len(shape) == 4 else (shape[0], 1, *shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """uint8 of pixels, float32 of other numbers."""
        return torch.uint8 if self.array.dtype == np.uint8 else torch.float32

    def __len__(self) -> int:
        """N."""
        return len(self.array)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Read samples: int64 (*) -> (*, C, H, W)."""
        x = as_tensor(self.array[index.numpy()]).view(*index.shape, *self.shape[1:])
        if x.is_floating_point() and not x.isfinite().all():
            bad = index[~x.isfinite().flatten(index.ndim).all(-1)]
            raise ValueError(f"{self.path} has NaN or infinite pixels in image {int(bad.min())}; remove or repair it")
        return x

    def stamp(self) -> bytes:
        """Name, size and modification time of the file."""
        return stamp([self.path])


def read_npy(path: Path, *, mapped: bool) -> np.ndarray:
    """Read an ``.npy`` file, or map it into memory; pickled objects are refused.

    Raises:
        ValueError: the file is damaged, or not of this format.

    """
    try:
        if mapped:
            return np.lib.format.open_memmap(checked_file(path), mode="r")
        with checked_file(path).open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as an npy file of a plain array ({reason_of(error)})") from error


def as_tensor(x: np.ndarray) -> Tensor:
    """Copy numbers into a tensor, uint8 unchanged and others as float32: (*) -> (*)."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32))


def stamp(paths: Sequence[str | Path]) -> bytes:
    """List names, sizes and modification times (ns) of files, in order.

    As in make and rsync, since reading all bytes may take longer than the cached work. Without the folder's name, so
    that it may be moved. A replaced file of equal size and time is not detected.
    """
    stats = [(os.path.basename(path), os.stat(path)) for path in paths]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats).encode(
        errors="surrogateescape"
    )
