"""What is asked of the device around a measurement; a CPU has nothing to wait for, and no peak of its own."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch


def sync(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: torch.device) -> int | None:
    """Peak of memory since the last reset, in MiB."""
    return round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give memory back that nothing holds any more, for the next measurement's peak to be its own."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after some errors the device refuses everything, and the next check says so
            torch.cuda.empty_cache()


def milliseconds(call: Callable[[], object], device: torch.device, times: int = 12, batches: int = 5) -> float:
    """Median time of a call, over batches of so many calls after a first one."""
    found = []
    for _ in range(batches + 1):
        sync(device)
        began = time.perf_counter()
        for _ in range(times):
            call()
        sync(device)
        found.append((time.perf_counter() - began) / times)
    return round(1e3 * statistics.median(found[1:]), 3)
