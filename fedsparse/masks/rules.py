"""The named rules of ``conf/mask_rule``: each scores every coordinate, and the best scores train.

A rule of your own is a subclass with its own ``scores``, a YAML beside the others, and a row in the contract test
(``tests/test_mask_rules.py``).

Shapes: ``P`` coordinates of the space.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fedsparse.core.checks import check_flag
from fedsparse.core.space import ParamSpace
from fedsparse.masks.autoflip import AutoFLIP
from fedsparse.masks.criteria import Movement, Snip, SynFlow
from fedsparse.masks.mask import Mask
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.sensitivity import Fisher
from fedsparse.masks.sparsity import Sparsity
from fedsparse.masks.talos import Talos, talos

__all__ = [
    "AutoFLIP",
    "Dense",
    "Fisher",
    "FromFile",
    "Magnitude",
    "MaskRule",
    "Movement",
    "Random",
    "Snip",
    "SynFlow",
    "Talos",
    "talos",
]


class Magnitude(MaskRule):
    """Scores by the absolute pre-trained value (Han et al. 2015 prune by it).

    Args:
        largest: train the coordinates of largest magnitude, or of smallest.

    Raises:
        ValueError: neither True nor False.

    """

    def __init__(self, largest: bool) -> None:
        check_flag("mask_rule.largest", largest)
        self.largest = largest

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Take absolute values."""
        return row.abs()


class Random(MaskRule):
    """Scores uniformly at random: exactly k coordinates, whatever their values."""

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw from [0, 1) in float64, where ties are as good as impossible."""
        return torch.rand(row.shape, generator=generator, device=generator.device, dtype=torch.float64)


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
