"""Gradient masks. Shapes: ``P`` coordinates of the space."""

from __future__ import annotations

from torch import Tensor

from fedsparse.masks.evidence import Evidence
from fedsparse.masks.rules.snip import Snip


class Gradient(Snip):
    """Scores by the size of the summed gradient alone, whatever the weight."""

    def scores(self, evidence: Evidence) -> Tensor:
        """Take the absolute sum."""
        return evidence.measured.abs()
