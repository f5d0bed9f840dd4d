"""Merging of low-rank updates into the frozen weights that they belong to, by the server and every client alike.

Shapes: K clients of a cohort, P coordinates of the space; a pair is A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.core import parallel
from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.factors import Factors
from fedsparse.federation.lowrank import Pair, residual, stack
from fedsparse.models.lora import Adapter

Received = dict[str, dict[int, tuple[float, Pair]]]  # by layer and client


class Merging:
    """Adds what the mean of the factors lacks to the frozen weights after each round (FedEx-LoRA, Singhal et al. 2025).

    The adapters stay averaged; their product and the merged residual are together the mean of the clients' updates. The
    residual travels as factors, of ranks that add up over the clients of the round.

    Args:
        net: whose frozen weights change.
        adapters: by layer; the frozen weight of one is ``<layer>.base_layer.weight``.
        space: of the rows.
        seed: the run's seed.
        ranks: of each client, whose factors are 0 beyond it; empty if all have the adapters' rank.

    Attributes:
        factors: of all layers.
        kept: merged factors of each layer, round by round, on the CPU; None once the weight itself has fewer values.
        received: weights and factors of this round's clients, by layer and client.
        sent: values of the merged factors, by round.

    Raises:
        ValueError: there are no adapters, or a factor is not averaged.

    """

    name = "merging=fedex"
    restarts = False  # whether every round begins with fresh adapters, of which B is 0

    def __init__(
        self,
        net: nn.Module,
        adapters: Mapping[str, Adapter],
        space: ParamSpace,
        seed: int = 0,
        ranks: Sequence[int] = (),
    ) -> None:
        self.factors = Factors(adapters, space)
        if not adapters or len(self.factors.adapters) < len(adapters):
            raise ValueError(f"{self.name} merges adapters of which both factors are averaged: set lora=r8")
        self.net, self.adapters, self.space, self.seed, self.ranks = net, adapters, space, seed, ranks
        self.kept: dict[str, list[Pair] | None] = {layer: [] for layer in adapters}
        self.received: Received = {}
        self.sent: dict[int, int] = {}

    @property
    def drawn(self) -> Tensor:
        """Coordinates that each client draws itself after a round, bool (P,): they do not travel down."""
        return torch.zeros(self.space.size, dtype=torch.bool)

    def open(self) -> None:
        """Forget the last round's factors."""
        self.received = {}

    def receive(self, received: Update, row: Tensor, subspace: Subspace) -> None:
        """Take the factors of a cohort as the server decoded them.

        Args:
            received: changes of the clients, and their weights.
            row: the global row (P,) before the server's step.
            subspace: what trains.

        """
        for k, weight in enumerate(received.weight):
            if weight > 0:
                whole = row.clone()
                subspace.write(whole, subspace.of(row) + received.rows[k])
                for layer, pair in self.factors.of(whole).items():
                    if self.ranks:
                        rank = self.ranks[received.clients[k]]
                        pair = Pair(pair.A[:rank], pair.B[:, :rank])
                    self.received.setdefault(layer, {})[received.clients[k]] = (weight, pair)

    @torch.no_grad()
    def close(self, number: int, row: Tensor) -> Tensor:
        """Merge the round's factors into the frozen weights.

        Args:
            number: of the round, from 0.
            row: the global row (P,) after the server's step.

        Returns:
            The row that the next round starts from.

        """
        everyone: Received = {}
        for part in parallel.gather(self.received):
            for layer, members in part.items():
                everyone.setdefault(layer, {}).update(members)
        values = 0
        for layer, members in everyone.items():
            weights, pairs = zip(*(members[client] for client in sorted(members)), strict=True)  # whoever trained them
            merged = self.merged(list(pairs), list(weights))
            base = self.net.get_parameter(base_of(layer))
            pair = Pair(merged.A.to(base).contiguous(), merged.B.to(base).contiguous())
            base.addmm_(pair.B, pair.A)
            self._keep(layer, pair, base.numel())
            values += merged.A.numel() + merged.B.numel()
        self.sent[number], self.received = values, {}
        return self.restarted(number, row)

    def _keep(self, layer: str, pair: Pair, most: int) -> None:
        """Keep a round's factors for checkpoints, while all of a layer are fewer values than its weight has."""
        kept = self.kept[layer]
        if kept is not None:
            kept.append(Pair(*(factor.to("cpu", copy=True) for factor in pair)))
            if sum(a.numel() + b.numel() for a, b in kept) >= most:
                self.kept[layer] = None

    def merged(self, pairs: list[Pair], weights: list[float]) -> Pair:
        """Factor what is added to the frozen weight of a layer."""
        return residual(pairs, weights)

    def restarted(self, number: int, row: Tensor) -> Tensor:
        """Build the row that the next round starts from: the mean."""
        return row

    def between(self, held: int, number: int) -> int:
        """Count the values of the factors that were merged at the ends of rounds ``held`` to before ``number``."""
        return sum(values for round, values in self.sent.items() if held <= round < number)

    def state_dict(self) -> dict[str, Any]:
        """Counts of what was merged, and of each layer its factors, round by round, or its weight."""
        layers = {
            layer: {"weight": self.net.get_parameter(base_of(layer)).detach().cpu()}
            if kept is None
            else {"A": [pair.A for pair in kept], "B": [pair.B for pair in kept]}
            for layer, kept in self.kept.items()
        }
        return {"sent": dict(self.sent), "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the counts of a checkpoint, and merge into the network's weights, as built, what it holds."""
        self.sent = dict(state["sent"])
        for layer, stored in state["layers"].items():
            self.kept[layer] = None if "weight" in stored else list(map(Pair, stored["A"], stored["B"]))
            again(self.net.get_parameter(base_of(layer)), stored)


def base_of(layer: str) -> str:
    """Name the frozen weight beside which a layer's adapter stands."""
    return f"{layer}.base_layer.weight"


@torch.no_grad()
def again(weight: Tensor, stored: Mapping[str, Any]) -> None:
    """Merge into a frozen weight (out, in), as it was built, what a checkpoint holds of its layer, in place.

    The factors are added round by round, as they were: their stack, or a difference of weights, has other roundings.

    Args:
        weight: the layer's.
        stored: ``A`` and ``B``, factors of each round, or ``weight``.

    """
    if "weight" in stored:
        weight.copy_(stored["weight"])
    else:
        for a, b in zip(stored["A"], stored["B"], strict=True):
            weight.addmm_(b.to(weight), a.to(weight))


class Stacking(Merging):
    """Merges the mean of the clients' updates whole, and starts fresh adapters (FLoRA, Wang et al. 2024).

    The new A is the same for all clients, drawn by (seed, round), and the new B is 0: neither travels down.
    """

    name = "merging=flora"
    restarts = True

    @property
    def drawn(self) -> Tensor:
        """Both factors of every layer."""
        marks = torch.zeros(self.space.size, dtype=torch.bool)
        tensors = self.space.unflatten(marks)
        for adapter in self.adapters.values():
            tensors[adapter.down].fill_(True)
            tensors[adapter.up].fill_(True)
        return marks

    def merged(self, pairs: list[Pair], weights: list[float]) -> Pair:
        """Stack the factors of all clients."""
        return stack(pairs, weights)

    def restarted(self, number: int, row: Tensor) -> Tensor:
        """Draw A as PEFT does (Kaiming uniform with a = sqrt(5): within 1 / sqrt(in)), and set B to 0."""
        fresh, generator = row.clone(), torch_generator(self.seed, Purpose.ADAPTERS, number)
        tensors = self.space.unflatten(fresh)
        for adapter in self.adapters.values():
            down = tensors[adapter.down]
            drawn = torch.rand(down.shape, generator=generator, dtype=torch.float64) * 2 - 1
            down.copy_(drawn / down.shape[1] ** 0.5)
            tensors[adapter.up].zero_()
        return fresh
