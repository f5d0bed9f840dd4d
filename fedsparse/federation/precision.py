"""Half precision without Lightning's loss scaler, which would be one for all clients; they scale their own losses."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision import MixedPrecision


class HalfPrecision(MixedPrecision):
    """Autocast to float16; ``ClientModule`` scales each client's loss and divides its gradient again.

    Args:
        device: where the clients train; on a CPU it is slow, and there to be tested.

    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("16-mixed", device.type)
        self.scaler = None
