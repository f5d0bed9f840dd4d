"""The device of a run: Lightning's choice, except Apple GPUs."""

from __future__ import annotations

import warnings
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
