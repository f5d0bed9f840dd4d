"""Half precision without Lightning's loss scaler, which would be one for all clients; and double precision."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import precision


class HalfPrecision(precision.MixedPrecision):
    """Autocast to float16; ``ClientModule`` scales each client's loss and divides its gradient again.

    Args:
        device: where the clients train; on a CPU it is slow, and there to be tested.

    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("16-mixed", device.type)
        self.scaler = None


class DoublePrecision(precision.DoublePrecision):
    """Float64 for what a network makes in its forward; itself and its inputs are float64 already."""

    def convert_input(self, data: Any) -> Any:
        """Hand a cohort on: its samples are gathered later, and its numbers are the host's."""
        return data
