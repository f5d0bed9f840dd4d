"""SynFlow (Tanaka et al. 2020): which coordinates carry the flow of absolute weights, without data.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsparse.core.checks import check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.masks.gradients import Losses
from fedsparse.masks.mask import Mask
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity
from fedsparse.masks.thinned import Thinned
from fedsparse.models.modes import evaluating


class SynFlow(Thinned):
    r"""Scores by the flow through the network of absolute weights, without any data (Tanaka et al. 2020, SynFlow).

    .. math:: R = \sum_c f_{|\theta|}(1)_c, \qquad s_j = |\theta_j| \, \partial R / \partial |\theta_j|

    with the inputs all ones, in eval mode and float64; after iteration i of n density^(i/n) of the coordinates are
    left, and no client is asked for anything. R means what the paper says, a sum over paths that is conserved layer by
    layer, in networks of linear and convolutional layers with ReLU only. Normalisation layers and attention are no
    products of weights: there the scores are defined as above, and conserve nothing; the running statistics are as
    they are.

    Under a schedule its state is float64 (P,), the order in which coordinates are given up: the later an iteration, and
    within one the larger a score, the higher. So the masks of all ratios up to the last lie within each other.

    Args:
        iterations: n, at least 1.

    Raises:
        ValueError: no such number.

    """

    renewable = True

    def __init__(self, iterations: int = 100) -> None:
        check_whole("mask_rule.iterations", iterations, 1)
        self.iterations = iterations

    def view(self, row: Tensor, state: Tensor | None) -> Tensor:
        """Take out what was given up: (P,)."""
        return row if state is None else row * still(state)

    def take(
        self, state: Tensor | None, observed: Tensor, *, space: ParamSpace, sparsity: Sparsity, round: int, rounds: int
    ) -> Tensor:
        """Give up the worst of those that are still there, and under a schedule note in which order."""
        before = None if state is None else still(state)
        scores = observed.clone()
        kept = super().take(before, observed, space=space, sparsity=sparsity, round=round, rounds=rounds)
        if sparsity.schedule is None:
            return kept
        return given_up(torch.zeros_like(scores) if state is None else state, before, kept, scores, round)

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Make the mask of the last iteration, or of a ratio on the way there."""
        if observed is None or observed.dtype == torch.bool:
            return super().mask(space, row, sparsity, observed, generator)
        return Mask.of(
            space, select(observed, space, sparsity, largest=True), rule=type(self).__name__, **sparsity.metadata
        )

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


def still(state: Tensor) -> Tensor:
    """Say what is still there: bool (P,), of that itself or of an order."""
    return state if state.dtype == torch.bool else state >= state.max().floor()


def given_up(order: Tensor, before: Tensor | None, kept: Tensor, scores: Tensor, round: int) -> Tensor:
    """Note an iteration in the order: whole numbers are iterations survived, fractions ranks by score within one.

    >>> given_up(torch.zeros(3), None, torch.tensor([False, True, False]), torch.tensor([2.0, 9.0, 1.0]), 0)
    tensor([0.5000, 1.0000, 0.0000])
    """
    lost = ~kept if before is None else before & ~kept
    ranked = order.clone()
    for those, survived in ((lost, round), (kept, round + 1)):
        rank = torch.empty(int(those.sum()), dtype=order.dtype, device=order.device)
        rank[scores[those].argsort(stable=True)] = torch.arange(len(rank), dtype=order.dtype, device=order.device)
        ranked[those] = survived + rank / max(1, len(rank))
    return ranked
