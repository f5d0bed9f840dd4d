"""One client's row, which the network's parameters are views of, so that it trains without a copy.

Shapes: P coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsparse.models.units import compute_all_units, compute_units_only, linear_layers
from fedsparse.places import Piece
from fedsparse.space import Binding, ParamSpace


class BoundRow:
    """The row of a cohort of one. What does not train takes no gradient: frozen tensors, frozen units of linear layers.

    Args:
        net: the network.
        space: its federated tensors.
        theta: the row (1, P), with its gradient.
        mask: bool (P,), what some client trains.
        split: the pieces of the row that the optimizer steps.

    Attributes:
        views: these pieces: views of the row, with views of its gradient.

    """

    def __init__(self, net: nn.Module, space: ParamSpace, theta: Tensor, mask: Tensor, split: Sequence[Piece]) -> None:
        assert theta.grad is not None
        self.net, self.space, self.row, self.grad = net, space, theta[0], theta.grad[0]
        self.views = [piece.of(self.row) for piece in split]
        for view, piece in zip(self.views, split, strict=True):
            view.grad = piece.of(self.grad)
        self.trained = {name for name, marks in space.unflatten(mask).items() if bool(marks.any())}
        self.units = self._units({piece.name: piece.mask for piece in split if piece.name and piece.mask is not None})

    def _units(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output units that train, by the weight's name, of the linear layers that train by units."""
        layers = linear_layers(self.net, masks)
        return {name: masks[name].flatten(1).any(1).nonzero().squeeze(1) for name in layers}

    def bind(self) -> None:
        """Make the network's parameters and gradients views of the row's, and let its layers skip what is frozen."""
        self.binding: Binding = self.space.bind(self.net, self.row, self.grad, self.trained.__contains__)
        compute_units_only(self.net, self.units)
        gradients = dict(zip(self.binding.names, self.binding.gradients, strict=True))
        self.by_unit = [(gradients.pop(name), index) for name, index in self.units.items()]
        self.whole = list(gradients.values()) if len(gradients) < len(self.space.names) else [self.grad]

    def intact(self) -> bool:
        """Whether the network is still bound to the row."""
        return self.binding.intact()

    def clear(self) -> None:
        """Set to zero what a backward writes, and touch nothing else."""
        torch._foreach_zero_(self.whole)
        for gradient, index in self.by_unit:
            gradient.index_fill_(0, index, 0.0)

    def release(self) -> None:
        """Give the network's layers their own backward again."""
        compute_all_units(self.net)
