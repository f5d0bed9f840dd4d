"""The device that a run trains on: Lightning's choice, where that can carry a run."""

from __future__ import annotations

import warnings

import lightning
import torch


def device_of(accelerator: str) -> torch.device:
    """Find the device that the Trainer will train on."""
    return lightning.Fabric(accelerator=accelerator, devices=1).device


def accelerator(chosen: str) -> str:
    """Name the accelerator to train on, never an Apple GPU: it has no float64, which sums over clients are in.

    Raises:
        ValueError: an Apple GPU is asked for.

    """
    if chosen == "mps" or device_of(chosen).type == "mps":
        text = "an Apple GPU has no float64, which sums over clients are in"
        if chosen != "auto":
            raise ValueError(f"trainer.accelerator={chosen}: {text}; set trainer.accelerator=cpu")
        warnings.warn(f"{text}: trainer.accelerator=auto trains on the CPU", stacklevel=1)  # said once in a process
        return "cpu"
    return chosen
