"""Factors of low-rank adapters, as they lie in rows. Shapes: P coordinates of the space; A (r, in), B (out, r)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.federation.lowrank import Pair
from fedsparse.models.lora import Adapter


class Factors:
    """Reads the factors of adapters from rows, where they are averaged.

    Args:
        adapters: of the network, by layer.
        space: of the rows.

    Attributes:
        adapters: those of which neither factor stays with the clients, and both train.
        downs: those whose A is averaged.
        ups: those whose B is averaged.
        space: of the rows.

    """

    def __init__(self, adapters: Mapping[str, Adapter], space: ParamSpace) -> None:
        local = {name for name, part in space.unflatten(space.local).items() if bool(part.any())}
        shared = set(space.names) - local
        self.adapters = {layer: a for layer, a in adapters.items() if {a.down, a.up} <= shared}
        self.downs = {layer: a for layer, a in adapters.items() if a.down in shared}
        self.ups = {layer: a for layer, a in adapters.items() if a.up in shared}
        self.space = space

    def of(self, row: Tensor) -> dict[str, Pair]:
        """Read the pairs of a row (P,) by layer, the scale in B; A is a view of the row."""
        tensors = self.space.unflatten(row)
        return {layer: Pair(tensors[a.down], a.scale * tensors[a.up]) for layer, a in self.adapters.items()}

    def norm(self, row: Tensor) -> float:
        """Norm of all averaged factors of a row (P,), without their scales."""
        tensors = self.space.unflatten(row.double())
        names = [*(a.down for a in self.downs.values()), *(a.up for a in self.ups.values())]
        return float(torch.cat([tensors[name].flatten() for name in names]).norm())

    def a_of(self, row: Tensor) -> Tensor:
        """Read every averaged A of a row (P,), one after the other."""
        tensors = self.space.unflatten(row)
        return torch.cat([tensors[a.down].flatten() for a in self.downs.values()])

    def b_of(self, row: Tensor) -> Tensor:
        """Read every averaged B of a row (P,), one after the other, with their scales."""
        tensors = self.space.unflatten(row)
        return torch.cat([a.scale * tensors[a.up].flatten() for a in self.ups.values()])
