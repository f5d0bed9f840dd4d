"""The mask of a file. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

import warnings

from torch import Tensor

from fedsparse.masks.evidence import Evidence
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

    def scores(self, evidence: Evidence) -> Tensor:
        """Read the file: bool (P,).

        Raises:
            ValueError: no such file, a damaged one, or one made for another model.

        Warns:
            UserWarning: the file freezes coordinates that ``sparsity.always_train`` trains.

        """
        space = evidence.space
        kept, always = Mask.load(self.path).row(space), space.where(evidence.sparsity.always_train)
        if added := int((always & ~kept).count_nonzero()):
            text = f"the mask file freezes {added} coordinates that sparsity.always_train trains; they train"
            warnings.warn(text, stacklevel=2)
        return kept | always

    def metadata(self, sparsity: Sparsity) -> dict[str, str]:
        """Take the file's own, its ratio among it."""
        return Mask.load(self.path).metadata | {"rule": "FromFile"}
