"""The row of one client, into which the network's parameters are views, so that it trains without a copy.

Shapes: P coordinates, B samples of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsparse.core.space import Binding, ParamSpace
from fedsparse.core.targets import Weigh
from fedsparse.models.units import compute_all_units, compute_units_only, trained_units
from fedsparse.optim.index import Block

Forward = Callable[[Tensor], Tensor]
Losses = Callable[[Forward, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """A network bound to a row, and the places of its gradients.

    Attributes:
        binding: its parameters, and their gradients that are views into the row's.
        taken: parameters whose gradient each backward allocates, and the view of the block that receives it.
        swept: gradients that are zeroed whole after a step.
        by_unit: gradients of which some units are zeroed, with the units' indices.

    """

    binding: Binding
    taken: list[tuple[nn.Parameter, Tensor]]
    swept: list[Tensor]
    by_unit: list[tuple[Tensor, Tensor]]


class BoundRow:
    """The row of a cohort of one. Frozen tensors, and frozen units of linear layers, get no gradient.

    Large tensors get a new gradient in each backward, which saves adding it to zeros; small ones share the row's.

    Args:
        net: the network.
        space: its federated tensors.
        theta: the row (1, P), with its gradient.
        mask: bool (P,), True where some client trains.
        blocks: of the row, which the optimizer steps.
        losses: of every sample of a batch: (forward, x, y) -> (B,).
        forward: the network, or its compiled form.
        weigh: weights of the samples in a batch's mean; None: all are equal.

    Attributes:
        views: these blocks, as views of the row.
        gradients: of these views, after a backward.

    """

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        theta: Tensor,
        mask: Tensor,
        blocks: Sequence[Block],
        losses: Losses,
        forward: Forward,
        weigh: Weigh | None = None,
    ) -> None:
        assert theta.grad is not None
        self.net, self.space, self.row, self.grad = net, space, theta[0], theta.grad[0]
        self.losses, self.forward, self.weigh = losses, forward, weigh
        self.gradients: list[Tensor] = []
        self.blocks = [replace(block, mask=None) for block in blocks]
        self.views = [block.of(self.row) for block in blocks]
        self.trained = {name for name, marks in space.unflatten(mask).items() if bool(marks.any())}
        masks = {block.name: block.mask for block in blocks if block.name and block.mask is not None}
        self.units = trained_units(net, masks) if forward is net else {}  # compiled code adds to no .grad
        self.apart = {block.name for block in blocks if block.name} - self.units.keys()
        for view, block in zip(self.views, blocks, strict=True):
            view.grad = None if block.name in self.apart else block.of(self.grad)
        self.bound = self._bound()

    def bind(self) -> None:
        """Bind the network again, after its gradients were cleared."""
        self.bound = self._bound()

    def _bound(self) -> Bound:
        """Make the network's parameters and gradients views into the row's, and its layers skip frozen units."""
        trained, apart = self.trained.__contains__, self.apart.__contains__
        binding = self.space.bind(self.net, self.row, self.grad, trained, apart)
        compute_units_only(self.net, self.units)
        gradients = dict(zip(binding.names, binding.gradients, strict=True))
        by_unit = [(gradients.pop(name), index) for name, index in self.units.items()]
        swept = list(gradients.values()) if len(gradients) < len(self.space.names) else [self.grad]
        named = zip(self.blocks, self.views, strict=True)
        taken = [(self.net.get_parameter(p.name), view) for p, view in named if p.name in self.apart]
        return Bound(binding, taken, swept, by_unit)

    def backward(self, x: Tensor, y: Tensor, count: Sequence[int], scale: Tensor | None) -> Tensor:
        """Compute the gradient of the mean loss over the real samples.

        Args:
            x: inputs (B, ...).
            y: labels (B,), or sequences of targets (B, L).
            count: number of real samples of the one client.
            scale: factor of the loss (1,), or None.

        Returns:
            The mean loss (), not scaled.

        """
        real = count[0]
        if real < len(y):
            x, y = x[:real], y[:real]
        losses = self.losses(self.forward, x, y)
        # as mean().backward(), two kernels shorter
        weight = losses.new_full((real,), 1 / real) if self.weigh is None else normalised(self.weigh(y)).to(losses)
        losses.backward(weight if scale is None else weight * scale)
        for parameter, view in self.bound.taken:  # gradients that this backward has allocated
            view.grad = torch.zeros_like(view) if parameter.grad is None else parameter.grad
        self.gradients = [view.grad for view in self.views if view.grad is not None]
        return losses.detach().mean() if self.weigh is None else (losses.detach() * weight).sum()

    def parts(self, row: Tensor) -> list[Tensor]:
        """View a row (P,) or (1, P) block by block, as ``views`` and ``gradients`` are."""
        return [block.of(row.view(-1)) for block in self.blocks]

    def intact(self) -> bool:
        """Whether every gradient is the view that was bound.

        Lightning sets every ``.grad`` to None before each validation, and ``.to()`` may replace the data: either would
        train a copy, not the row. The check takes a few microseconds, once a cohort.
        """
        bound = self.bound.binding
        return all(p.grad is g for p, g in zip(bound.parameters, bound.gradients, strict=True))

    def clear(self) -> None:
        """Clear the gradients: None where the next backward allocates them, zero where this one wrote."""
        self.gradients = []
        for parameter, view in self.bound.taken:
            parameter.grad = view.grad = None
        if self.bound.swept:
            torch._foreach_zero_(self.bound.swept)
        for gradient, index in self.bound.by_unit:
            gradient.index_fill_(0, index, 0.0)

    def release(self) -> None:
        """Restore the backward of the network's layers."""
        compute_all_units(self.net)


def normalised(weights: Tensor) -> Tensor:
    """Scale weights of samples to a sum of 1 for each client, or leave them all 0: (*, B) -> float64 (*, B)."""
    exact = weights.double()
    total = exact.sum(-1, keepdim=True)
    return exact / torch.where(total > 0, total, 1.0)
