"""The device of a run: Lightning's choice, except Apple GPUs."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch

from fedsparse.core.precisions import HALF


def device_of(accelerator: str) -> torch.device:
    """Look up the device on which the Trainer will train."""
    return lightning.Fabric(accelerator=accelerator, devices=1).device


def fabric_of(accelerator: str, precision: str) -> lightning.Fabric:
    """Build what computes as the Trainer will; half precision, whose steps are fedsparse's own, as float32."""
    wanted: Any = None if precision == HALF else precision
    return lightning.Fabric(accelerator=accelerator, devices=1, precision=wanted)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Read the peaks of memory in bytes: of this process so far, and of tensors on its GPU, if there is one."""
    scale = 1 if sys.platform == "darwin" else 1024  # in which a system counts
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_memory": scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "peak_memory_gpu": on_gpu}


@contextmanager
def kernels(deterministic: bool | str, tf32: bool) -> Iterator[None]:
    """Choose torch's kernels for a run, preparation included; the switches are the process's, and are restored.

    Args:
        deterministic: ``trainer.deterministic``: True, False, or ``warn``.
        tf32: ``federation.tf32``.

    """
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    products = torch.get_float32_matmul_precision()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's libraries start
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
    if tf32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_float32_matmul_precision(products)


def accelerator(chosen: str) -> str:
    """Choose the accelerator; never an Apple GPU, which has no float64, the dtype of sums over clients.

    Raises:
        ValueError: an Apple GPU is asked for.

    """
    if chosen == "mps" or device_of(chosen).type == "mps":
        text = "an Apple GPU has no float64, which sums over clients are in"
        if chosen != "auto":
            raise ValueError(f"trainer.accelerator={chosen}: {text}; set trainer.accelerator=cpu")
        warnings.warn(f"{text}: trainer.accelerator=auto trains on the CPU", stacklevel=1)  # shown once in a process
        return "cpu"
    return chosen
