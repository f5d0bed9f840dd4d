"""The mask of a file. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.masks.mask import Mask
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.sparsity import Sparsity


class FromFile(MaskRule):
    """Takes the mask of a file, whatever the ratio; coordinates in ``sparsity.always_train`` train even so.

    Args:
        path: a file that ``Mask.save`` wrote, or any safetensors file of bool tensors under the network's names.

    Raises:
        ValueError: no path.

    """

    def __init__(self, path: str | None) -> None:
        if not path or not isinstance(path, str):
            raise ValueError("mask_rule=from_file needs mask_rule.path=<a mask.safetensors file>")
        self.path = path

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Read the file.

        Raises:
            ValueError: no such file, a damaged one, or one made for another model.

        Warns:
            UserWarning: the file freezes coordinates that ``sparsity.always_train`` trains.

        """
        loaded = Mask.load(self.path)
        kept, always = loaded.row(space), space.where(sparsity.always_train)
        if added := int((always & ~kept).count_nonzero()):
            text = f"the mask file freezes {added} coordinates that sparsity.always_train trains; they train"
            warnings.warn(text, stacklevel=2)
        return Mask(space.unflatten(kept | always), loaded.metadata | {"rule": "FromFile"})
