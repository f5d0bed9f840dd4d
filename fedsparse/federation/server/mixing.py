"""Mixing of the groups' global rows: those of groups that are alike move towards their mean.

Shapes: G groups, P coordinates of the space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number, check_whole
from fedsparse.core.seeding import Purpose, number
from fedsparse.core.space import ParamSpace
from fedsparse.federation.clusters import (
    CHOICES,
    METHODS,
    METRICS,
    REPRESENTATIONS,
    ROW,
    Clusters,
    cluster,
    cosines,
    embed,
    gram,
)
from fedsparse.federation.factors import Factors
from fedsparse.models.lora import Adapter

SEEDS = 1 << 32  # of scikit-learn


@dataclass(frozen=True)
class Mixed:
    """Rows after a mixing.

    Attributes:
        rows: (G, P).
        clusters: of the groups; None in a round without a mixing.
        similarities: cosines of the groups (G, G), by what is compared.

    """

    rows: Tensor
    clusters: Clusters | None = None
    similarities: Mapping[str, Tensor] | None = None


class Mixing(Protocol):
    """Mixes global rows after the server's step; a function of rows and round, so that a resume goes on alike."""

    def __call__(self, rows: Tensor, round: int) -> Mixed:
        """Mix the rows (G, P) of a round, counted from 0."""


class ClusterMixing:
    """Clusters groups by their adapters, or by their rows, and moves each towards the mean of its cluster.

    Args:
        space: of the rows.
        adapters: of the network, by layer; empty without.
        start: the row (P,) of the network as built.
        of: what is compared: see ``clusters.gram``; ``row``: the change of the whole row.
        metric: ``cosine`` or ``euclidean``.
        method: of clustering; see ``clusters.cluster``.
        k: number of clusters, or what chooses it.
        k_range: smallest and largest number that may be chosen.
        every: rounds between two mixings.
        share: m of (1 - m) x + m (mean of the cluster), unweighted; a group alone in its cluster stays.
        global_share: g of (1 - g) x + g (mean of all groups), afterwards.
        seed: the run's seed.

    Raises:
        ValueError: an invalid option, or factors that are not in the rows.

    """

    def __init__(
        self,
        space: ParamSpace,
        adapters: Mapping[str, Adapter],
        start: Tensor,
        of: str = "BA",
        metric: str = "cosine",
        method: str = "kmeans",
        k: str | int = "silhouette",
        k_range: Sequence[int] = (2, 5),
        every: int = 1,
        share: float = 0.3,
        global_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_choice("mixing.of", of, *REPRESENTATIONS, ROW)
        check_choice("mixing.metric", metric, *METRICS)
        check_choice("mixing.method", method, *METHODS)
        if isinstance(k, str):
            check_choice("mixing.k", k, *CHOICES)
        check_whole("mixing.every", every, 1)
        check_number("mixing.share", share, least=0, most=1)
        check_number("mixing.global_share", global_share, least=0, most=1)
        self.factors = Factors(adapters, space)
        if of != ROW and not self.factors.adapters:
            raise ValueError(
                f"mixing.of={of} compares adapters of which both factors are averaged, and there are none: set "
                "mixing.of=row, or lora=r8 with method=fedit"
            )
        self.start, self.of, self.metric, self.method = start, of, metric, method
        self.k, self.k_range, self.every = k, (k_range[0], k_range[1]), every
        self.share, self.global_share, self.seed = share, global_share, seed

    def __call__(self, rows: Tensor, round: int) -> Mixed:
        """Mix the rows (G, P), where the round is due.

        Raises:
            ValueError: rows that are not finite, or a group whose adapters are zero under cosine.

        """
        if (round + 1) % self.every:
            return Mixed(rows)
        grams = self.grams(rows)
        points = embed(grams[self.of], self.metric)
        found = cluster(points, self.method, self.k, self.k_range, number(self.seed, Purpose.CLUSTERS, round) % SEEDS)
        mixed = rows.clone()
        for label in range(found.k):
            members = [group for group, own in enumerate(found.labels) if own == label]
            if len(members) > 1:
                mixed[members] = torch.lerp(rows[members], rows[members].mean(0), self.share)
        mixed = torch.lerp(mixed, mixed.mean(0).expand_as(mixed), self.global_share)
        return Mixed(mixed, found, {name: cosines(inner) for name, inner in grams.items()})

    def grams(self, rows: Tensor) -> dict[str, Tensor]:
        """Compute the groups' inner products (G, G) by all that can be compared."""
        changes = (rows - self.start.to(rows)).double().cpu()
        found = {ROW: changes @ changes.T}
        if self.factors.adapters:
            members, start = [self.factors.of(row) for row in rows], self.factors.of(self.start.to(rows))
            found |= {of: gram(members, of, start) for of in REPRESENTATIONS}
        return found
