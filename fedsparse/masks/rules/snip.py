"""SNIP (Lee et al. 2019): which coordinates the loss would miss, to first order.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace
from fedsparse.masks.evidence import Batches, Evidence
from fedsparse.masks.gradients import Losses, gradients, own
from fedsparse.masks.rule import MaskRule
from fedsparse.models.modes import evaluating


class Snip(MaskRule):
    r"""Scores by how much the loss would move without a coordinate, to first order (Lee et al. 2019, SNIP).

    .. math:: s_j = \left| \theta_j \sum_i \partial \ell(x_i, y_i) / \partial \theta_j \right|

    The signed gradients are summed over samples, batches and clients, and the absolute value is taken at the end, so
    that who holds which sample does not matter. In eval mode.
    """

    needs = (Batches(),)

    def observe(
        self,
        net: nn.Module,
        space: ParamSpace,
        x: Tensor,
        y: Tensor,
        *,
        loss: Losses,
        generator: torch.Generator | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Add the gradient of the summed losses of one batch: float64 (P,)."""
        total = torch.zeros(space.size, dtype=torch.float64, device=x.device) if into is None else into
        with evaluating(net):
            found = gradients(net, own(net, space), x, y, loss)
        for part, gradient in zip(space.unflatten(total).values(), found, strict=True):
            part.add_(gradient)
        return total

    def scores(self, evidence: Evidence) -> Tensor:
        """Multiply by the weights: the sum has the order of the mean."""
        return (evidence.row * evidence.measured).abs()
