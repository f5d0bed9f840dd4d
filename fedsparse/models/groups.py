"""Groups of layers that share units, and which of these units carry nothing.

Shapes: U units of a group, O output units and I inputs of a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.models.attention import attentions, spare_one, zero_columns
from fedsparse.models.members import Member, idle, is_gate, is_layer, is_plain, kind, member_of, zero_inputs

MISSING = "fedsparse.export needs torch-pruning: pip install 'fedsparse[export]'"


@dataclass(frozen=True)
class Verdict:
    """What may leave a group.

    Attributes:
        layers: names of the layers that make its units; the first is the root.
        removable: bool (U,), units that can go.
        why: what keeps the others that are zero.

    """

    layers: tuple[str, ...]
    removable: Tensor
    why: str


class Groups:
    """Groups of coupled layers of a network, by torch-pruning.

    Args:
        net: the network, in eval mode; every parameter requires a gradient.
        x: inputs (N, ...).

    Raises:
        ValueError: torch-pruning is not installed.

    """

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.names = {module: name for name, module in net.named_modules()}
        self.zero = zero_inputs(net, x)
        self.apart = {net.get_submodule(layer) for a in attentions(net) for layer, _ in a.places}
        self.graph = _graph(net, x)

    def judge(self) -> list[Verdict]:
        """Say of every group which units can leave it."""
        return [self._verdict(group) for group in self.graph.get_all_groups(ignored_layers=list(self.apart))]

    def modules(self, verdict: Verdict) -> list[nn.Module]:
        """List the layers that a removal changes."""
        return [m.module for m in self._members(self._group(verdict)) if m.module in self.names]

    def remove(self, verdict: Verdict) -> None:
        """Remove the units, in place."""
        self._group(verdict).prune()

    def _group(self, verdict: Verdict) -> Any:
        modules = {name: module for module, name in self.names.items()}
        root = modules[verdict.layers[0]]
        prune = self.graph.get_pruner_of_module(root).prune_out_channels
        return self.graph.get_pruning_group(root, prune, verdict.removable.nonzero().squeeze(1).tolist())

    def _members(self, group: Any) -> list[Member]:
        return [member_of(self.graph, item) for item in group]

    def _verdict(self, group: Any) -> Verdict:
        members = self._members(group)
        units = len(members[0].unit)
        made = [m for m in members if m.made and is_layer(m.module)]
        names = tuple(self.names[m.module] for m in made)
        nothing = torch.zeros(units, dtype=torch.bool)
        if obstacle := self._obstacle(members):
            return Verdict(names, nothing, obstacle)
        takers = [m for m in members if not m.made and is_layer(m.module)]
        constant = _constant(made, [m for m in members if is_gate(m.module)], takers, units)
        free = torch.ones(units, dtype=torch.bool)
        for taker in takers:
            silent = constant & taker.all(self.zero[taker.module], units)
            free &= silent | taker.all(zero_columns(taker.module), units)
        return Verdict(names, spare_one(free), _kept_because(made, units))

    def _obstacle(self, members: Sequence[Member]) -> str:
        """Name what keeps a whole group as it is; empty if nothing does."""
        for member in members:
            if not (is_layer(member.module) or is_gate(member.module) or is_plain(member.module)):
                return f"their outputs go through {kind(member.module)}"
            if member.made and member.module in self.apart:
                return "they belong to heads"
        if any(m.made and m.last for m in members) or not any(not m.made and is_layer(m.module) for m in members):
            return "they are the network's outputs"
        return ""


def _constant(made: Sequence[Member], gates: Sequence[Member], takers: Sequence[Member], units: int) -> Tensor:
    """Mark the units whose value no input moves: bool (U,).

    All that make it have weights of zero (a bias is a constant); or one makes it, one takes it, and a gate between has.
    """
    constant = torch.ones(units, dtype=torch.bool)
    for member in made:
        constant &= member.all(idle(member.module.weight), units)
    if len(made) == len(takers) == 1:  # a chain: the gate is on the only way
        for gate in gates:
            if isinstance(gate.module.weight, Tensor):
                constant |= gate.all(idle(gate.module.weight), units)
    return constant


def _kept_because(made: Sequence[Member], units: int) -> str:
    if units == 1:
        return "one unit has to stay"
    if len(made) > 1:
        return "they are summed with units that are not zero"
    return "a bias or the shift of a norm makes them other than zero where the next layer takes them"


def _graph(net: nn.Module, x: Tensor) -> Any:
    """Trace a network."""
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ValueError(MISSING) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parameters outside layers, such as a class token: groups with them stay
        return DependencyGraph().build_dependency(net, example_inputs=[x[:2].clone()])
