"""Masks that are thinned out in rounds: what is given up in one round stays out in the next.

Shapes: ``P`` coordinates of the space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.masks.mask import Mask
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity


class Thinned(MaskRule):
    """Keeps density^((round + 1) / rounds) of the coordinates after each round, scored anew among those still there.

    Its state is bool (P,), True where a coordinate is still there; those in ``sparsity.always_train`` stay True. The
    scores themselves are not kept, so the mask cannot be chosen anew for another sparsity; a rule that keeps the order
    in which coordinates are given up (``SynFlow``) can.
    """

    renewable = False

    def start(self, row: Tensor, state: Tensor | None) -> Tensor:
        """Score each round anew, under the weights it sees: zeros, float64 (P,)."""
        return super().start(row, None)

    def take(
        self, state: Tensor | None, observed: Tensor, *, space: ParamSpace, sparsity: Sparsity, round: int, rounds: int
    ) -> Tensor:
        """Give up the worst of those that are still there, down to density^((round + 1) / rounds): bool (P,)."""
        power = (round + 1) / rounds
        if state is None:
            return select(observed, space, sparsity, largest=self.largest, power=power)
        scores = observed.masked_fill_(~state, -math.inf if self.largest else math.inf)
        return select(scores, space, sparsity, largest=self.largest, power=power) & state

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Make the mask of the state after the last round.

        Raises:
            ValueError: no state.

        """
        name = type(self).__name__
        if observed is None or observed.dtype != torch.bool:
            raise ValueError(f"{name} needs calibration rounds: hand in the state that take() returned, bool (P,)")
        return Mask.of(space, observed, rule=name, **sparsity.metadata)
