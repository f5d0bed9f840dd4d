"""The device of a run: Lightning's choice, except Apple GPUs."""

from __future__ import annotations

import warnings

import lightning
import torch


def device_of(accelerator: str) -> torch.device:
    """Look up the device on which the Trainer will train."""
    return lightning.Fabric(accelerator=accelerator, devices=1).device


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
