"""What averaging does to low-rank adapters, layer by layer: the distance of what the server has from what it should.

Shapes: P coordinates of the space; a pair is A (r, in), B (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedsparse.core import parallel
from fedsparse.core.lines import RoundLines
from fedsparse.core.space import ParamSpace
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.factors import Factors
from fedsparse.federation.lowrank import Pair, effective_rank, error, norm, stack
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change
from fedsparse.federation.watcher import Watcher
from fedsparse.models.lora import Adapter

if TYPE_CHECKING:
    from fedsparse.federation.round import Round

COLUMNS = "round,group,layer,error,relative_error,norm,effective_rank"


class AdapterTable(Watcher):
    """Writes ``lora.csv``: of each round, group and layer how far the product of mean factors is from the mean product.

    The clients' updates are taken as they were computed, before an exchange leaves parts of them out, and weighed as
    the server weighs them. Layers of which a factor stays with the clients or does not train are left out: the first
    have no common product, and of the others the mean is exact.

    Args:
        table: of the figures.
        adapters: of the network, by layer.
        space: of the rows.

    Attributes:
        factors: of the layers of which both are averaged.
        pairs: weights and factors of this round's clients, by group and layer.
        last: root of the summed squares of all layers' errors, and that as a part of the ideal's; empty before.

    """

    def __init__(self, table: RoundLines, adapters: Mapping[str, Adapter], space: ParamSpace) -> None:
        self.table, self.factors = table, Factors(adapters, space)
        self.pairs: dict[tuple[int, str], list[tuple[float, Pair]]] = {}
        self.last: dict[str, float] = {}

    def open(self, round: Round) -> None:
        """Forget the last round's factors."""
        self.pairs, self.last = {}, {}

    def receive(self, round: Round, trained: Update, received: Update) -> None:
        """Take the factors of each client that counts."""
        if trained.values is None or not self.factors.adapters:
            return
        server, groups = round.federation.server, round.federation.topology.group(received.clients)
        for values, weight, group in zip(trained.values, received.weight, groups, strict=True):
            if weight > 0:
                row = server.rows[group].clone()
                server.subspace.write(row, values)
                for layer, pair in self.factors.of(row).items():
                    self.pairs.setdefault((group, layer), []).append((weight, pair))

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Measure and write the round."""
        found = dict[tuple[int, str], list[tuple[float, Pair]]]()
        for part in parallel.gather(self.pairs):
            for key, more in part.items():
                found.setdefault(key, []).extend(more)
        lines, absolute, ideals = list[str](), 0.0, 0.0
        for (group, layer), members in sorted(found.items()):
            weights, pairs = zip(*members, strict=True)
            (distance, relative), ideal = error(pairs, weights), stack(pairs, weights)
            size = norm(ideal)
            figures = ",".join(f"{value:.7g}" for value in (distance, relative, size, effective_rank(ideal)))
            lines.append(f"{round.number + 1},{group},{layer},{figures}\n")
            absolute, ideals = absolute + distance**2, ideals + size**2
        self.table.append(lines)
        if lines:
            relative = math.sqrt(absolute / ideals) if ideals else 0.0
            self.last = {"lora/error": math.sqrt(absolute), "lora/relative_error": relative}
        self.pairs = {}

    def figures(self) -> dict[str, float]:
        """Give the error of the last round, over all layers."""
        return self.last
