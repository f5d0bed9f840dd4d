"""Clusters of groups of clients by their low-rank adapters, from inner products alone.

Shapes: D members, each with a pair A (r, in), B (out, r) of every layer; Gram matrices are float64 (D, D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number, check_whole
from fedsparse.federation.lowrank import Pair

Layers = Mapping[str, Pair]
A, A_START, B, BA = REPRESENTATIONS = ("A", "A-start", "B", "BA")
ROW = "row"  # the change of all that trains, with or without adapters
COSINE, EUCLIDEAN = METRICS = ("cosine", "euclidean")
SILHOUETTE, ELBOW = CHOICES = ("silhouette", "elbow")
METHODS = ("kmeans", "agglomerative")


def gram(members: Sequence[Layers], of: str, start: Layers | None = None) -> Tensor:
    """Compute the inner products of members, summed over layers.

    Args:
        members: D of them, with the same layers.
        of: ``A``, ``A-start`` (its change from where all began), ``B``, or ``BA``, the update itself: of products by
            their r x r factors.
        start: the factors where all began, for ``A-start``.

    Raises:
        ValueError: an unknown representation, or no start where one is needed.

    """
    check_choice("mixing.of", of, *REPRESENTATIONS)
    if of == A_START and start is None:
        raise ValueError("mixing.of=A-start needs the factors that training began with")
    found = torch.zeros(len(members), len(members), dtype=torch.float64)
    for layer in members[0]:
        pairs = [member[layer] for member in members]
        if of == BA:
            found += torch.tensor([[_of_products(one, other) for other in pairs] for one in pairs], dtype=torch.float64)
            continue
        parts = [pair.B if of == B else pair.A for pair in pairs]
        begun = start[layer].A.double() if of == A_START and start is not None else 0.0
        rows = torch.stack([(part.double() - begun).flatten().cpu() for part in parts])
        found += rows @ rows.T
    return found


def _of_products(one: Pair, other: Pair) -> float:
    """Inner product of two products B A."""
    return float(((one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)).sum())


def cosines(gram: Tensor) -> Tensor:
    """Cosine similarities (D, D), from -1 to 1; NaN with a member that is zero."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    return gram / (lengths.unsqueeze(0) * lengths.unsqueeze(1))


def embed(gram: Tensor, metric: str = EUCLIDEAN) -> np.ndarray:
    """Find D points with these inner products, or with these cosines: float64 (D, D) (classical scaling).

    Raises:
        ValueError: a member is not finite, or is zero under cosine.

    """
    check_choice("mixing.metric", metric, *METRICS)
    if not bool(gram.isfinite().all()):
        raise ValueError("adapters of a department are not finite: clustering cannot go on")
    if metric == COSINE:
        zero = (gram.diagonal() <= 0).nonzero().flatten().tolist()
        if zero:
            line = f"adapters of department {zero[0]} are zero and have no direction"
            raise ValueError(f"{line}; set mixing.metric=euclidean")
        gram = cosines(gram)
    values, vectors = torch.linalg.eigh(gram)
    points: np.ndarray = (vectors * values.clamp(min=0).sqrt()).numpy()
    return points


@dataclass(frozen=True)
class Clusters:
    """An assignment of members to clusters.

    Attributes:
        labels: of each member, from 0, in the order of their first members.
        k: number of clusters.
        scores: what chose k, by candidate; empty where it was given.
        inertia: sum of squared distances to the clusters' means.

    """

    labels: tuple[int, ...]
    k: int
    scores: Mapping[int, float]
    inertia: float


def cluster(
    points: np.ndarray,
    method: str = "kmeans",
    k: str | int = SILHOUETTE,
    k_range: tuple[int, int] = (2, 5),
    seed: int = 0,
) -> Clusters:
    """Cluster points by scikit-learn.

    Args:
        points: (D, any).
        method: ``kmeans``, or ``agglomerative`` (average linkage).
        k: a number of clusters, or what chooses it: ``silhouette`` (Rousseeuw 1987) or ``elbow``.
        k_range: smallest and largest number that may be chosen.
        seed: of k-means.

    Raises:
        ValueError: an unknown option, or more clusters than points.

    """
    check_choice("mixing.method", method, *METHODS)
    members = len(points)
    if isinstance(k, int) and not isinstance(k, bool):
        check_number("mixing.k", k, whole=True, least=1, most=members)
        return _of(points, _labels(points, method, k, seed), {})
    check_choice("mixing.k", k, *CHOICES)
    for bound in k_range:
        check_whole("mixing.k_range", bound, 2)
    candidates = range(k_range[0], min(k_range[1], members - 1, distinct(points)) + 1)
    if not candidates:
        return _of(points, (0,) * members, {})
    tried = {count: _labels(points, method, count, seed) for count in candidates}
    if k == SILHOUETTE:
        scores = {count: _silhouette(points, labels) for count, labels in tried.items()}
        best = max(scores, key=lambda count: scores[count])
    else:
        known = {count: tried.get(count) or _labels(points, method, count, seed) for count in range(1, max(tried) + 2)}
        scores = {count: _of(points, labels, {}).inertia for count, labels in known.items()}
        best = min(max(elbow(list(scores.values())), k_range[0]), max(tried))
    return _of(points, tried[best], scores)


def elbow(inertias: Sequence[float]) -> int:
    """Choose the number of clusters where the inertia's fall slows down most: its largest second difference.

    Args:
        inertias: of 1, 2, ... clusters.

    >>> elbow([100, 30, 8, 6, 5]), elbow([100, 80, 20, 15, 12])
    (2, 3)
    """
    if len(inertias) < 3:
        return len(inertias)
    bends = np.diff(np.asarray(inertias, dtype=np.float64), 2)
    return int(bends.argmax()) + 2


def distinct(points: np.ndarray) -> int:
    """Count points that differ by more than rounding: k-means finds no more clusters than there are.

    >>> distinct(np.array([[1.0, 0.0], [1.0, 1e-12], [0.0, 1.0]]))
    2
    """
    scale = float(np.abs(points).max()) or 1.0
    return len(np.unique((points / scale).round(6), axis=0))


def _labels(points: np.ndarray, method: str, k: int, seed: int) -> tuple[int, ...]:
    """Cluster into so many, and number the clusters by their first members."""
    from sklearn.cluster import AgglomerativeClustering, KMeans

    k = min(k, distinct(points))
    if k == 1:
        return (0,) * len(points)
    made: Any = (
        KMeans(k, n_init=10, random_state=seed) if method == "kmeans" else AgglomerativeClustering(k, linkage="average")
    )
    first = dict[int, int]()
    return tuple(first.setdefault(int(label), len(first)) for label in made.fit_predict(points))


def _silhouette(points: np.ndarray, labels: Sequence[int]) -> float:
    """Mean silhouette; of points that are all equal, or all alone, -1."""
    from sklearn.metrics import silhouette_score

    if not 2 <= len(set(labels)) < len(points):
        return -1.0
    return float(silhouette_score(points, labels))


def _of(points: np.ndarray, labels: tuple[int, ...], scores: Mapping[int, float]) -> Clusters:
    """Measure an assignment."""
    groups = [points[np.array(labels) == label] for label in sorted(set(labels))]
    inertia = math.fsum(float(((group - group.mean(0)) ** 2).sum()) for group in groups)
    return Clusters(labels, len(groups), dict(scores), inertia)
