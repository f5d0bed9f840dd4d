"""No mask: everything trains. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.masks.evidence import Evidence
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.sparsity import Sparsity


class Dense(MaskRule):
    """Everything trains, whatever the ratio."""

    def scores(self, evidence: Evidence) -> Tensor:
        """Mark every coordinate: bool (P,)."""
        return torch.ones(evidence.space.size, dtype=torch.bool)

    def metadata(self, sparsity: Sparsity) -> dict[str, str]:
        """Give the ratio that it has, not the one asked for."""
        return {"rule": "Dense", "ratio": "0.0"}
