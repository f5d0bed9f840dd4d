"""Magnitude pruning (Han et al. 2015). Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

from torch import Tensor

from fedsparse.core.checks import check_flag
from fedsparse.masks.evidence import Evidence
from fedsparse.masks.rule import MaskRule


class Magnitude(MaskRule):
    """Scores by the absolute value.

    Args:
        largest: train the coordinates of largest magnitude, or of smallest.

    Raises:
        ValueError: neither True nor False.

    """

    def __init__(self, largest: bool) -> None:
        check_flag("mask_rule.largest", largest)
        self.largest = largest

    def scores(self, evidence: Evidence) -> Tensor:
        """Take absolute values."""
        return evidence.row.abs()
