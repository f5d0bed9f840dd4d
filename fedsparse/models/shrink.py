"""A pruned network made really smaller: units that are zero leave it, with the inputs that they feed.

What hangs together is found by torch-pruning's dependency graph (Fang et al. 2023, "DepGraph: Towards Any Structural
Pruning"). That graph does not say whether a removal changes the outputs; the rules here do, and every removal is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.models.attention import Attention, attentions, idle_heads, keep_heads, spare_one, zero_rows
from fedsparse.models.groups import Groups, Verdict
from fedsparse.models.members import is_layer

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Cut:
    """What became of one layer's units.

    Attributes:
        layer: the layer, or attention module.
        units: what they are, ``units`` or ``heads``.
        before: how many there were.
        after: how many are left.
        dead: how many of those left are zero, with their bias.
        why: what keeps them, in words; empty if there are none.

    """

    layer: str
    units: str
    before: int
    after: int
    dead: int
    why: str


def shrink(net: nn.Module, x: Tensor) -> tuple[nn.Module, list[Cut]]:
    """Remove what is zero and can be removed without changing an output.

    A unit (hidden unit, channel) leaves if its weights and bias are zero and it is still exactly zero where the next
    layers take it, or if all of these multiply it by zero. A head leaves if its values or its columns of the projection
    are zero. At least one unit of each layer stays.

    Args:
        net: pruned; not changed.
        x: inputs (N, ...) to try every removal on: it is put back if an output moves by more than ``TOLERANCE``.

    Returns:
        The smaller network, in eval mode, and what became of each layer that lost units or holds dead ones.

    Raises:
        ValueError: torch-pruning is not installed.

    """
    small = copy.deepcopy(net).requires_grad_(True).eval()
    trial = Trial(small, x)
    heads = [_fewer_heads(small, attention, trial) for attention in attentions(small)]
    verdicts = _cut_units(small, x, trial)
    return small, [cut for cut in [*heads, *_compare(net, small, verdicts)] if cut.before > cut.after or cut.dead]


class Trial:
    """Tries a change of a network, and takes it back if an output moves.

    Args:
        net: the network, in eval mode.
        x: inputs (N, ...).

    """

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.net, self.x = net, x
        with torch.no_grad():
            self.target = net(x.clone())

    def keeps(self, change: Callable[[], object], modules: Sequence[nn.Module]) -> bool:
        """Change some modules in place; False if that was taken back."""
        before = [(module, _state(module)) for module in modules]
        change()
        try:
            with torch.no_grad():
                good = close(self.net(self.x.clone()), self.target)
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # sizes that do not fit: something reads this layer in its own way
            good = False
        if not good:
            for module, state in before:
                vars(module).update(state)
        return good


def close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs agree to ``TOLERANCE``, absolutely, or relatively where they are larger than 1."""
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE))


def _state(module: nn.Module) -> dict[str, Any]:
    """Remember a module's attributes, and which tensors it holds."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}


def _fewer_heads(net: nn.Module, attention: Attention, trial: Trial) -> Cut:
    """Remove the idle heads of a layer."""
    idle = idle_heads(net, attention)
    kept = ~spare_one(idle)
    layers = [*dict.fromkeys(layer for layer, _ in attention.places), attention.proj, attention.name]
    modules = [net.get_submodule(layer) for layer in layers]
    done = not kept.all() and trial.keeps(lambda: keep_heads(net, attention, kept), modules)
    after = int(kept.sum()) if done else attention.heads
    dead = int(idle.sum()) - (attention.heads - after)
    why = "one head has to stay" if done or attention.heads == 1 else "the layer does not run with fewer heads"
    return Cut(attention.name, "heads", attention.heads, after, dead, why if dead else "")


def _cut_units(net: nn.Module, x: Tensor, trial: Trial) -> dict[str, str]:
    """Remove units until nothing more leaves; what one layer no longer takes may free units of the one before.

    Returns:
        Why dead units stay, by the name of the layer.

    """
    refused: set[str] = set()
    while True:
        groups = Groups(net, x)
        verdicts = groups.judge()
        tried = [v for v in verdicts if v.layers[0] not in refused and bool(v.removable.any())]
        failed = [v.layers[0] for v in tried if not _remove(groups, v, trial)]
        refused |= set(failed)
        if len(failed) == len(tried):
            return {layer: _why(v, refused) for v in verdicts for layer in v.layers}


def _remove(groups: Groups, verdict: Verdict, trial: Trial) -> bool:
    return trial.keeps(lambda: groups.remove(verdict), groups.modules(verdict))


def _why(verdict: Verdict, refused: set[str]) -> str:
    return "removing them changes the outputs" if verdict.layers[0] in refused else verdict.why


def _compare(net: nn.Module, small: nn.Module, why: dict[str, str]) -> list[Cut]:
    """Compare both networks layer by layer."""
    cuts = []
    for (name, old), new in zip(net.named_modules(), small.modules(), strict=True):
        if is_layer(old):
            dead = int(zero_rows(new).sum())
            sizes = len(old.get_parameter("weight")), len(new.get_parameter("weight"))
            cuts.append(
                Cut(name, "units", *sizes, dead, why.get(name, "of heads, only whole ones can leave") if dead else "")
            )
    return cuts
