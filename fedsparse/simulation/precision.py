"""Precision plugins: half precision without Lightning's loss scaler, which all clients would share; and double."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import precision


class HalfPrecision(precision.MixedPrecision):
    """Autocast to float16; ``Clients`` scale each client's loss and divide its gradient by the scale.

    Args:
        device: of the clients; float16 on a CPU is slow, and supported for tests.

    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("16-mixed", device.type)
        self.scaler = None


class DoublePrecision(precision.DoublePrecision):
    """Float64 for tensors that a network creates in its forward; its weights and inputs are float64 already."""

    def convert_input(self, data: Any) -> Any:
        """Return a cohort unchanged: its samples are gathered later, and its numbers stay on the host."""
        return data
