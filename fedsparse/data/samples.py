"""Images that stay on the disk until they are asked for.

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
    """What a split's ``x`` may be instead of a tensor: as much of a tensor as gathering needs."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, C, H, W)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is gathered."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Gather samples on the CPU: int64 (*) -> (*, C, H, W); a ValueError names what cannot be read."""

    def stamp(self) -> bytes:
        """Tell these samples from others, and from themselves after a change, without reading them."""


class Mapped:
    """The images of an ``.npy`` file, of which only what is asked for is read.

    Args:
        path: holds numbers of shape (N, C, H, W), or (N, H, W) for one channel. Bytes are kept as pixels, everything
            else becomes float32.

    Raises:
        ValueError: the file cannot be mapped; when gathered from, an image has NaN or infinite pixels: to look for
            them at the start would be to read the whole file.

    """

    def __init__(self, path: Path) -> None:
        self.path, self.array = path, read_npy(path, mapped=True)

    def __reduce__(self) -> Any:
        """Pickle the path: numpy would pickle the whole array."""
        return Mapped, (self.path,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        shape = self.array.shape
        return shape if len(shape) == 4 else (shape[0], 1, *shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Pixels stay bytes, other numbers become float32."""
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
        """Give name, size and time of change."""
        return stamp([self.path])


def read_npy(path: Path, *, mapped: bool) -> np.ndarray:
    """Read an ``.npy`` file, or map it into memory; pickled objects are refused.

    Raises:
        ValueError: the file is damaged, or holds something else.

    """
    try:
        if mapped:
            return np.lib.format.open_memmap(checked_file(path), mode="r")
        with checked_file(path).open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as an npy file of a plain array ({reason_of(error)})") from error


def as_tensor(x: np.ndarray) -> Tensor:
    """Copy numbers into a tensor, bytes as they are and others as float32: (*) -> (*)."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32))


def stamp(paths: Sequence[str | Path]) -> bytes:
    """Give the names of files in their order, their sizes and the times of their last change in nanoseconds.

    As make and rsync do: reading every byte may take longer than what the answer saves. The folder's own name is left
    out, so that it may be moved. A file that was replaced with its size and its time kept is not noticed.
    """
    held = [(os.path.basename(path), os.stat(path)) for path in paths]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in held).encode(
        errors="surrogateescape"
    )
