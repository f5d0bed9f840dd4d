"""Copies between host and device: to the device without a wait, and back with one wait for several tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; the host goes on at once, and the device's next operation sees the copy.

    A copy from pageable memory first waits until the device is idle, so that the tensor is pinned before.
    """
    if device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def read(*vectors: Tensor) -> list[list[float]]:
    """Read vectors of a device, of any lengths, as numbers; the host waits for the device once.

    >>> read(torch.tensor([1.0, 2.0]), torch.tensor([3]))
    [[1.0, 2.0], [3.0]]
    """
    numbers: Iterator[float] = iter(torch.cat(vectors).tolist())
    return [list(islice(numbers, len(vector))) for vector in vectors]
