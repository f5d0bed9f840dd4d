"""Random masks. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.masks.rule import MaskRule


class Random(MaskRule):
    """Scores uniformly at random: exactly k coordinates, whatever their values."""

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw from [0, 1) in float64, where ties are as good as impossible."""
        return torch.rand(row.shape, generator=generator, device=generator.device, dtype=torch.float64)
