"""Members of a group of coupled layers: layers, gates and operations, and the units that pass through them.

Shapes: U units of a group, O output units and I inputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Member:
    """A module's part in a group.

    Attributes:
        module: a layer, or a stand-in for an operation.
        made: whether the units are its outputs; else its inputs.
        local: int64 (n,), indices of the module's outputs or inputs ...
        unit: int64 (n,), ... and the unit that each belongs to.
        last: whether nothing takes its output.

    """

    module: Any
    made: bool
    local: Tensor
    unit: Tensor
    last: bool

    def all(self, marks: Tensor, units: int) -> Tensor:
        """Mark units of which every index is marked: bool (O,) or (I,) -> (U,)."""
        found = torch.ones(units, dtype=torch.bool)
        found[self.unit[~marks[self.local]]] = False
        return found


def member_of(graph: Any, item: Any) -> Member:
    """Read an item of a torch-pruning group."""
    dep, local = item
    node, made = dep.target, bool(graph.is_out_channel_pruning_fn(dep.handler))
    places, units = (torch.tensor(list(map(int, index)), dtype=torch.long) for index in (local, item.root_idxs))
    return Member(node.module, made, places, units, last=not node.outputs)


def is_layer(module: object) -> bool:
    """Whether a module is a linear layer, or a convolution of all its channels."""
    return isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)


def is_gate(module: object) -> bool:
    """Whether a module scales every channel by itself: BatchNorm in eval mode, a depthwise convolution."""
    depthwise = isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1
    return isinstance(module, _BatchNorm) or depthwise


def is_plain(module: object) -> bool:
    """Whether torch-pruning's stand-in is of an operation that leaves every channel where it is."""
    from torch_pruning import ops

    return isinstance(module, ops._ElementWiseOp | ops._ReshapeOp)


def kind(module: object) -> str:
    """Name a module, or the operation that torch-pruning's stand-in is of."""
    return type(module).__name__.strip("_").removesuffix("Op")


def idle(weight: Tensor) -> Tensor:
    """Mark the outputs whose weights are zero: (O, *) -> bool (O,)."""
    return (weight.detach() == 0).reshape(len(weight), -1).all(1)


@torch.no_grad()
def zero_inputs(net: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """Mark the inputs of every layer that are zero for all of x, wherever the layer is used: bool (I,)."""
    seen: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels = inputs[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
        zero = (channels == 0).all(1)
        seen[module] = seen[module] & zero if module in seen else zero

    hooks = [m.register_forward_pre_hook(look) for m in net.modules() if is_layer(m)]
    try:
        net(x.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return seen
