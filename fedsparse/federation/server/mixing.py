"""Mixing of the groups' global rows: those of groups that are alike move towards their mean.

Shapes: G groups, P coordinates of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number, check_whole
from fedsparse.core.seeding import Purpose, number
from fedsparse.core.space import ParamSpace
from fedsparse.federation.clusters import (
    A_START,
    BA,
    CHOICES,
    ELBOW,
    EUCLIDEAN,
    FIXED,
    KMEANS,
    METHODS,
    METRICS,
    NONE,
    ORIGINAL,
    REPRESENTATIONS,
    ROW,
    A,
    B,
    Clusters,
    cluster,
    cluster_as_original,
    cosines,
    embed,
    gram,
    gram_of_updates,
    measured,
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


class GlobalMixing:
    """Moves every group towards the mean of all groups, unweighted, after every round.

    Args:
        share: g of (1 - g) x + g (mean of all).
        first: mixes the rows before; None: nothing does.

    Raises:
        ValueError: the share is not from 0 to 1.

    """

    def __init__(self, share: float, first: Mixing | None = None) -> None:
        check_number("topology.global_mix", share, least=0, most=1)
        self.share, self.first = share, first

    def __call__(self, rows: Tensor, round: int) -> Mixed:
        """Mix the rows (G, P)."""
        mixed = Mixed(rows) if self.first is None else self.first(rows, round)
        mean = mixed.rows.mean(0).expand_as(mixed.rows)
        return replace(mixed, rows=torch.lerp(mixed.rows, mean, self.share))


class RankedMixing:
    """Mixes as another mixing, and leaves what a group of a smaller rank does not train (HetLoRA, Cho et al. 2024).

    So a mean is one of adapters padded with zeros, and each group takes the part of its own rank.

    Args:
        first: mixes the rows.
        marks: bool (G, P), what each group trains.

    """

    def __init__(self, first: Mixing, marks: Tensor) -> None:
        self.first, self.marks = first, marks

    def __call__(self, rows: Tensor, round: int) -> Mixed:
        """Mix the rows (G, P)."""
        mixed = self.first(rows, round)
        return replace(mixed, rows=torch.where(self.marks.to(rows.device), mixed.rows, rows))


class Comparison:
    """Inner products of rows, by what of them is compared: the averaged factors of adapters, or the whole row.

    Args:
        space: of the rows.
        adapters: of the network, by layer; empty without.
        start: the row (P,) of the network as built.

    Attributes:
        factors: of the adapters.
        known: what can be compared; see ``ClusterMixing``.

    """

    def __init__(self, space: ParamSpace, adapters: Mapping[str, Adapter], start: Tensor) -> None:
        self.factors, self.start = Factors(adapters, space), start
        self.known = (ROW, *_compared(self.factors))

    def check(self, key: str, of: str) -> None:
        """Refuse to compare what the rows do not hold; ``key`` is the config key.

        Raises:
            ValueError: one line, with what to set.

        """
        check_choice(key, of, *REPRESENTATIONS, ROW)
        if of not in self.known:
            factors = "both factors are" if of == BA else f"{of[0]} is"
            raise ValueError(
                f"{key}={of} compares adapters of which {factors} averaged, and there are none: set "
                f"{key}=row, or lora=r8 with method=fedit"
            )

    def gram(self, of: str, rows: Tensor) -> Tensor:
        """Compute the inner products (M, M), float64 on the CPU, of M rows (M, P)."""
        start, factors = self.start.to(rows), self.factors
        vectors: dict[str, Callable[[Tensor], Tensor]] = {
            ROW: lambda row: row - start,
            A: factors.a_of,
            A_START: lambda row: factors.a_of(row.double()) - factors.a_of(start.double()),
            B: factors.b_of,
        }
        return gram_of_updates([factors.of(row) for row in rows]) if of == BA else gram([vectors[of](r) for r in rows])


class ClusterMixing:
    """Clusters groups by their adapters, or by their rows, and moves each towards the mean of its cluster.

    Args:
        space: of the rows.
        adapters: of the network, by layer; empty without.
        start: the row (P,) of the network as built.
        groups: G, 2 or more.
        truth: true cluster of each group; empty if it is not known.
        of: what is compared: the averaged factors ``A``, ``A-start`` (their change since training began) or ``B``, the
            update ``BA``, or ``row``: the change of the whole row.
        metric: ``cosine`` or ``euclidean``.
        method: ``kmeans``, ``agglomerative``, ``fixed``, or ``none``, where every group stays as it is.
        k: number of clusters, or what chooses it: ``silhouette`` or ``elbow``.
        k_range: smallest and largest number that may be chosen.
        fixed: cluster of each group, for ``method=fixed``; None: the truth.
        every: rounds between two mixings.
        share: m of (1 - m) x + m (mean of the cluster), unweighted; a group alone in its cluster stays.
        compat: ``original`` clusters A as a public HFL-LoRA code does (``clusters.cluster_as_original``), and weighs
            members by the norms of their adapters, rounded down to 1 or more.
        seed: the run's seed.

    Raises:
        ValueError: an invalid option, factors that are not in the rows, or more clusters than groups.

    """

    def __init__(
        self,
        space: ParamSpace,
        adapters: Mapping[str, Adapter],
        start: Tensor,
        groups: int,
        truth: Sequence[int] = (),
        of: str = "BA",
        metric: str = "cosine",
        method: str = "kmeans",
        k: str | int = "silhouette",
        k_range: Sequence[int] = (2, 5),
        fixed: Sequence[int] | None = None,
        every: int = 1,
        share: float = 0.3,
        compat: str | None = None,
        seed: int = 0,
    ) -> None:
        self.comparison = Comparison(space, adapters, start)
        self.comparison.check("mixing.of", of)
        check_choice("mixing.metric", metric, *METRICS)
        check_choice("mixing.method", method, *METHODS)
        check_choice("mixing.compat", compat, None, ORIGINAL)
        check_whole("mixing.every", every, 1)
        check_number("mixing.share", share, least=0, most=1)
        _check_counts(k, k_range, groups)
        if compat and (of, metric, method, k) != (A, EUCLIDEAN, KMEANS, ELBOW):
            raise ValueError("mixing.compat=original clusters A by its own elbow: set mixing=original")
        self.of, self.metric, self.method = of, metric, method
        self.k, self.k_range, self.every = k, (k_range[0], k_range[1]), every
        self.share, self.compat, self.seed = share, compat, seed
        self.fixed = _fixed(truth if fixed is None else fixed, groups) if method == FIXED else tuple(range(groups))

    def __call__(self, rows: Tensor, round: int) -> Mixed:
        """Mix the rows (G, P), where the round is due.

        Raises:
            ValueError: adapters that are not finite.

        """
        if (round + 1) % self.every:
            return Mixed(rows)
        grams = {name: self.comparison.gram(name, rows) for name in self.comparison.known}
        found = self._clustered(rows, grams[self.of], round)
        mixed = rows.clone()
        for label in range(found.k):
            members = [group for group, own in enumerate(found.labels) if own == label]
            if len(members) > 1:
                mixed[members] = torch.lerp(rows[members], self._mean(rows[members]), self.share)
        return Mixed(mixed, found, {name: cosines(inner) for name, inner in grams.items()})

    def _clustered(self, rows: Tensor, inner: Tensor, round: int) -> Clusters:
        """Assign groups to clusters, from their inner products (G, G)."""
        points = embed(inner, self.metric)
        if self.method in (FIXED, NONE):
            return measured(points, self.fixed)
        if self.compat:
            return cluster_as_original(
                np.stack([self.comparison.factors.a_of(row).cpu().numpy() for row in rows]), round + 1
            )
        seed = number(self.seed, Purpose.CLUSTERS, round) % SEEDS
        return cluster(points, self.method, self.k, self.k_range, seed)

    def _mean(self, rows: Tensor) -> Tensor:
        """Average the rows of a cluster."""
        if not self.compat:
            return rows.mean(0)
        weights = rows.new_tensor([max(1, int(self.comparison.factors.norm(row))) for row in rows]).unsqueeze(1)
        return (weights / weights.sum() * rows).sum(0)


def _compared(factors: Factors) -> tuple[str, ...]:
    """List the representations of adapters that rows hold."""
    held = {A: factors.downs, A_START: factors.downs, B: factors.ups, BA: factors.adapters}
    return tuple(name for name, layers in held.items() if layers)


def _check_counts(k: str | int, k_range: Sequence[int], groups: int) -> None:
    """Refuse numbers of clusters that are no such numbers, or more than there are groups.

    Raises:
        ValueError: one line.

    """
    if isinstance(k, str):
        check_choice("mixing.k", k, *CHOICES)
    else:
        check_number(f"mixing.k, of {groups} departments,", k, whole=True, least=1, most=groups)
    if isinstance(k_range, str) or not isinstance(k_range, Sequence) or len(k_range) != 2:
        raise ValueError(f"mixing.k_range is {k_range!r}; it must be two numbers that rise, such as [2,5]")
    check_number("mixing.k_range", k_range[0], whole=True, least=2)
    check_number("mixing.k_range", k_range[1], whole=True, least=k_range[0])
    if k_range[0] > groups:
        raise ValueError(f"mixing.k_range begins with {k_range[0]} clusters, and there are {groups} departments")


def _fixed(labels: Sequence[int], groups: int) -> tuple[int, ...]:
    """Check a given assignment.

    Raises:
        ValueError: it is not one cluster for each group.

    """
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ValueError(f"mixing.fixed is {labels!r}; it must be null or a list with the cluster of each department")
    if len(labels) != groups:
        given = f"mixing.fixed lists {len(labels)}" if labels else "mixing.fixed is null, and the data names none"
        raise ValueError(f"mixing.method=fixed takes a cluster for each of {groups} departments; {given}")
    for label in labels:
        check_whole("mixing.fixed", label, 0)
    return tuple(labels)
