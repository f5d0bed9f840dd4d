"""Random masks. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.masks.evidence import Evidence
from fedsparse.masks.rule import MaskRule


class Random(MaskRule):
    """Scores uniformly at random: exactly k coordinates, whatever their values."""

    def scores(self, evidence: Evidence) -> Tensor:
        """Draw from [0, 1) in float64, where ties are as good as impossible."""
        draws = evidence.generator
        return torch.rand(evidence.row.shape, generator=draws, device=draws.device, dtype=torch.float64)
