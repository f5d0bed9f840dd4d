"""SynFlow (Tanaka et al. 2020): which coordinates carry the flow of absolute weights, without data.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsparse.core.checks import check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.masks.evidence import Evidence, Thinning
from fedsparse.masks.gradients import Losses
from fedsparse.masks.rule import MaskRule
from fedsparse.models.modes import evaluating

ITERATIONS = 100


class SynFlow(MaskRule):
    r"""Scores by the flow through the network of absolute weights, without any data (Tanaka et al. 2020, SynFlow).

    .. math:: R = \sum_c f_{|\theta|}(1)_c, \qquad s_j = |\theta_j| \, \partial R / \partial |\theta_j|

    with the inputs all ones, in eval mode and float64; after iteration i of n density^(i/n) of the coordinates are
    left, and no client is asked for anything. R means what the paper says, a sum over paths that is conserved layer by
    layer, in networks of linear and convolutional layers with ReLU only. Normalisation layers and attention are no
    products of weights: there the scores are defined as above, and conserve nothing; the running statistics are as
    they are.

    Args:
        iterations: n, at least 1.

    Raises:
        ValueError: no such number.

    """

    needs = (Thinning(rounds=ITERATIONS, order=True),)

    def __init__(self, iterations: int = ITERATIONS) -> None:
        check_whole("mask_rule.iterations", iterations, 1)
        self.needs = (Thinning(rounds=iterations, order=True),)

    def scores(self, evidence: Evidence) -> Tensor:
        """Take what is left, bool (P,), or under a schedule the order in which coordinates are given up, (P,)."""
        return evidence.measured

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
        """Add the flow of one input of ones, of which ``x`` gives the shape (b, ...): float64 (P,).

        Raises:
            ValueError: the network takes no numbers but tokens.

        """
        if not x.is_floating_point():
            raise ValueError("mask_rule=synflow feeds ones to the network, and text has none; take another mask_rule")
        sizes = {n: p.detach().double().abs() for n, p in net.named_parameters() if p.is_floating_point()}
        for name in space.names:
            sizes[name].requires_grad_()
        exact = {n: b.double() for n, b in net.named_buffers() if b.is_floating_point()}
        with evaluating(net), torch.enable_grad():
            flow = functional_call(net, sizes | exact, (torch.ones_like(x[:1], dtype=torch.float64),)).sum()
        leaves = [sizes[name] for name in space.names]
        found = torch.autograd.grad(flow, leaves, allow_unused=True, materialize_grads=True)
        total = torch.zeros(space.size, dtype=torch.float64, device=x.device) if into is None else into
        for part, leaf, gradient in zip(space.unflatten(total).values(), leaves, found, strict=True):
            part.add_(leaf.detach() * gradient)
        return total
