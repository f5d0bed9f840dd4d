"""No mask: everything trains. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.masks.mask import Mask
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.sparsity import Sparsity


class Dense(MaskRule):
    """Everything trains, whatever the ratio."""

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Mark every coordinate."""
        return Mask.of(space, torch.ones(space.size, dtype=torch.bool), rule="Dense", ratio="0.0")
