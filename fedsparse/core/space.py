"""The parameter space: the federated tensors of a model as one row, a flat vector of ``P`` coordinates.

Shapes: ``P`` coordinates of the space, ``K`` clients of a cohort, ``*`` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Patterns = str | Sequence[str]


def listed(patterns: Any) -> list[str]:
    """List glob patterns; a list among them is opened, as ``["*.lora_B.*", "${model.head}"]`` has one.

    >>> listed("head.*"), listed(["*.lora_B.*", ["head.*", "norm.*"], []])
    (['head.*'], ['*.lora_B.*', 'head.*', 'norm.*'])
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        return [patterns]
    return [name for part in patterns for name in listed(part)]


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a parameter's name matches at least one glob pattern.

    >>> matches("blocks.3.mlp.fc1.weight", ["head.*", "blocks.3.*"])
    True
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in given)


def always(name: str) -> bool:
    """Accept every name: the whole model is federated."""
    return True


def never(name: str) -> bool:
    """Accept no name."""
    return False


@dataclass(frozen=True)
class Binding:
    """The parameters of a network that are views into one row, with gradients that are views into another.

    Attributes:
        names: of parameters whose gradient is a view.
        parameters: of these names.
        gradients: the views that were bound as their ``.grad``.

    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    gradients: tuple[Tensor, ...]


def parameters_of(net: nn.Module, patterns: Patterns) -> list[nn.Parameter]:
    """List the parameters whose names match, such as those of the head."""
    return [parameter for name, parameter in net.named_parameters() if matches(name, patterns)]


class ParamSpace:
    """Names, shapes and offsets of a network's federated tensors in a row of ``P`` coordinates.

    Immutable. Tensors are in the order of ``net.named_parameters()``; a tied parameter is there once, under its first
    name. A space has no reference to the network: it reads and writes any network with these names and shapes.

    Args:
        names: names of the tensors, in the order of the row.
        shapes: their shapes.
        local: bool (P,), coordinates that stay with the client and are never sent; none by default.

    """

    def __init__(self, names: Sequence[str], shapes: Sequence[torch.Size], local: Tensor | None = None) -> None:
        self.names = tuple(names)
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.offsets = tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))
        self.size = sum(self.sizes)
        self.local = torch.zeros(self.size, dtype=torch.bool) if local is None else local

    @classmethod
    def of(cls, net: nn.Module, trainable: Callable[[str], bool] = always, local: Patterns = ()) -> ParamSpace:
        """Build the space of a network's floating-point parameters whose name ``trainable`` accepts.

        Args:
            net: the network.
            trainable: which parameter names are federated; the others stay at their pre-trained values.
            local: glob patterns of parameters that stay with each client.

        Raises:
            ValueError: nothing is trainable, or the parameters are of several dtypes.

        """
        chosen = [(n, p) for n, p in net.named_parameters() if p.is_floating_point() and trainable(n)]
        if not chosen:
            raise ValueError("model.trainable matches no parameter of the model; its parameters: " + _shorten(net))
        if len({p.dtype for _, p in chosen}) > 1:
            raise ValueError("the trainable parameters have several dtypes; convert the model to one first")
        space = cls([n for n, _ in chosen], [p.shape for _, p in chosen])
        return cls(space.names, space.shapes, space.where(local)) if local else space

    @classmethod
    def of_buffers(cls, net: nn.Module) -> ParamSpace:
        """Build the space of a network's floating-point buffers that a checkpoint stores (BatchNorm statistics)."""
        stored = net.state_dict().keys()
        chosen = [(n, b) for n, b in net.named_buffers() if n in stored and b.is_floating_point()]
        return cls([n for n, _ in chosen], [b.shape for _, b in chosen])

    def tensors(self, net: nn.Module) -> list[Tensor]:
        """List the network's tensors of this space, in the order of the row."""
        found = dict(net.named_parameters()) | dict(net.named_buffers())
        return [found[name] for name in self.names]

    def read(self, net: nn.Module) -> Tensor:
        """Copy the network's tensors into a new row (P,)."""
        flat = [t.detach().reshape(-1) for t in self.tensors(net)]
        return torch.cat(flat) if flat else torch.zeros(0)

    @torch.no_grad()
    def write(self, net: nn.Module, row: Tensor) -> None:
        """Copy a row (P,) into the network's tensors."""
        for tensor, part in zip(self.tensors(net), self._views(row), strict=True):
            tensor.copy_(part)

    def unflatten(self, row: Tensor) -> dict[str, Tensor]:
        """Split rows (*, P) into named tensors (*, *shape): views, so that gradients flow back to the rows."""
        return dict(zip(self.names, self._views(row), strict=True))

    def bind(
        self,
        net: nn.Module,
        row: Tensor,
        grad: Tensor,
        trained: Callable[[str], bool] = always,
        apart: Callable[[str], bool] = never,
    ) -> Binding:
        """Make the network's parameters views into ``row`` (P,) and their gradients views into ``grad`` (P,).

        Any module works, with no copy between the network and the row.

        Args:
            net: the network.
            row: its values.
            grad: their gradients.
            trained: selects the names that require a gradient; for others none is computed.
            apart: selects names whose gradient is not bound: each backward allocates it, which saves adding to zeros.

        """
        found = dict(net.named_parameters())
        for parameter in found.values():
            parameter.requires_grad_(False)
        for name, data, g in zip(self.names, self._views(row), self._views(grad), strict=True):
            found[name].data = data
            if trained(name):
                found[name].requires_grad_(True).grad = None if apart(name) else g
        names = tuple(name for name in self.names if trained(name) and not apart(name))
        bound = tuple(found[name] for name in names)
        return Binding(names, bound, tuple(p.grad for p in bound if p.grad is not None))

    def where(self, patterns: Patterns) -> Tensor:
        """Mark the coordinates of the tensors whose name matches a glob pattern: bool (P,)."""
        hits = torch.tensor([matches(name, patterns) for name in self.names], dtype=torch.bool)
        return hits.repeat_interleave(torch.tensor(self.sizes, dtype=torch.long))

    def _views(self, row: Tensor) -> Iterable[Tensor]:
        """View rows (*, P) as tensors, by ``split``: the backward of 150 slices takes fifty times as long."""
        if row.shape[-1] != self.size:
            raise ValueError(f"a row of this space has {self.size} coordinates, not {row.shape[-1]}")
        parts = row.split(self.sizes, dim=-1) if self.sizes else ()
        return [part.view((*row.shape[:-1], *shape)) for part, shape in zip(parts, self.shapes, strict=True)]

    def __eq__(self, other: object) -> bool:
        """Two spaces are equal when names and shapes agree."""
        return isinstance(other, ParamSpace) and (self.names, self.shapes) == (other.names, other.shapes)

    def __hash__(self) -> int:
        """Hash by names and shapes."""
        return hash((self.names, self.shapes))


def _shorten(net: nn.Module, limit: int = 6) -> str:
    """List the first few parameter names for an error message."""
    names = [name for name, _ in net.named_parameters()]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
