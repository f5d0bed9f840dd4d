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
ORIGINAL = "original"
ORIGINAL_MOST = 4096  # values of a vector that its clustering looks at
KMEANS, AGGLOMERATIVE, FIXED, NONE = METHODS = ("kmeans", "agglomerative", "fixed", "none")


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """Compute the inner products (D, D) of D vectors, in float64 on the CPU."""
    rows = torch.stack([vector.double().cpu() for vector in vectors])
    return rows @ rows.T


def gram_of_updates(members: Sequence[Layers]) -> Tensor:
    """Compute the inner products (D, D) of D members' updates B A, summed over layers, by their r x r factors.

    Args:
        members: D of them, with the same layers.

    """
    found = torch.zeros(len(members), len(members), dtype=torch.float64)
    for layer in members[0]:
        pairs = [member[layer] for member in members]
        found += torch.tensor([[_of_products(one, other) for other in pairs] for one in pairs], dtype=torch.float64)
    return found


def _of_products(one: Pair, other: Pair) -> float:
    """Inner product of two products B A."""
    return float(((one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)).sum())


def cosines(gram: Tensor) -> Tensor:
    """Cosine similarities (D, D), from -1 to 1; of a zero vector 0 to others, and 1 to itself and other zero vectors.

    >>> cosines(torch.tensor([[4.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([[ 1., -1.,  0.],
            [-1.,  1.,  0.],
            [ 0.,  0.,  1.]])
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    zero = lengths == 0
    found = gram / torch.where(zero, 1.0, lengths).unsqueeze(0) / torch.where(zero, 1.0, lengths).unsqueeze(1)
    return torch.where(zero.unsqueeze(0) | zero.unsqueeze(1), (zero.unsqueeze(0) & zero.unsqueeze(1)).to(gram), found)


def embed(gram: Tensor, metric: str = EUCLIDEAN) -> np.ndarray:
    """Find D points with these inner products, or with these cosines: float64 (D, D) (classical scaling).

    Raises:
        ValueError: a member is not finite.

    """
    check_choice("mixing.metric", metric, *METRICS)
    if not bool(gram.isfinite().all()):
        raise ValueError("adapters of a department are not finite: clustering cannot go on")
    if metric == COSINE:
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
    check_choice("mixing.method", method, KMEANS, AGGLOMERATIVE)
    members = len(points)
    if isinstance(k, int) and not isinstance(k, bool):
        check_number("mixing.k", k, whole=True, least=1, most=members)
        return measured(points, _labels(points, method, k, seed))
    check_choice("mixing.k", k, *CHOICES)
    for bound in k_range:
        check_whole("mixing.k_range", bound, 2)
    candidates = range(k_range[0], min(k_range[1], members - 1, distinct(points)) + 1)
    if not candidates:
        return measured(points, (0,) * members)
    tried = {count: _labels(points, method, count, seed) for count in candidates}
    if k == SILHOUETTE:
        scores = {count: _silhouette(points, labels) for count, labels in tried.items()}
        best = max(scores, key=lambda count: scores[count])
    else:
        known = {count: tried.get(count) or _labels(points, method, count, seed) for count in range(1, max(tried) + 2)}
        scores = {count: measured(points, labels).inertia for count, labels in known.items()}
        best = min(max(elbow(list(scores.values())), k_range[0]), max(tried))
    return measured(points, tried[best], scores)


def cluster_as_original(vectors: np.ndarray, round: int) -> Clusters:
    """Cluster as a public HFL-LoRA code does, with its shortcuts (``mixing.compat=original``).

    Of long vectors only each s-th value counts, so that at most 4,096 are left. k-means begins once, from 42 + the
    round. It tries 2 to 5 clusters, less than there are members, and takes the largest second difference of the
    inertias, which leave k = 1 out: with four members it always finds 2, and with five never. Its random numbers are
    scikit-learn's, not its own.

    Args:
        vectors: (D, any), the members' A; D of 2 or more.
        round: from 1.

    """
    step = math.ceil(vectors.shape[1] / ORIGINAL_MOST)
    points, members = vectors[:, ::step][:, :ORIGINAL_MOST], len(vectors)
    counts = range(2, max(2, min(5, members - 1)) + 1)
    tried = {count: _labels(points, KMEANS, count, 42 + round, starts=1) for count in counts}
    scores = {count: measured(points, labels).inertia for count, labels in tried.items()}
    best = 2 if len(counts) < 3 else counts[int(np.diff(list(scores.values()), 2).argmax()) + 1]
    return measured(points, tried[best], scores)


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


def _labels(points: np.ndarray, method: str, k: int, seed: int, starts: int = 10) -> tuple[int, ...]:
    """Cluster into so many; k-means keeps the best of some starts."""
    from sklearn.cluster import AgglomerativeClustering, KMeans

    k = min(k, distinct(points))
    if k == 1:
        return (0,) * len(points)
    means = KMeans(k, n_init=starts, max_iter=100 if starts == 1 else 300, random_state=seed)
    made: Any = means if method == KMEANS else AgglomerativeClustering(k, linkage="average")
    return tuple(made.fit_predict(points).tolist())


def _silhouette(points: np.ndarray, labels: Sequence[int]) -> float:
    """Mean silhouette; of points that are all equal, or all alone, -1."""
    from sklearn.metrics import silhouette_score

    if not 2 <= len(set(labels)) < len(points):
        return -1.0
    return float(silhouette_score(points, labels))


def measured(points: np.ndarray, labels: Sequence[int], scores: Mapping[int, float] | None = None) -> Clusters:
    """Measure an assignment of D points (D, any), and number its clusters by their first members.

    >>> measured(np.array([[0.0], [5.0], [2.0]]), [7, 1, 7]).labels
    (0, 1, 0)
    """
    first = dict[int, int]()
    numbered = tuple(first.setdefault(label, len(first)) for label in labels)
    groups = [points[np.array(numbered) == label] for label in range(len(first))]
    inertia = math.fsum(float(((group - group.mean(0)) ** 2).sum()) for group in groups)
    return Clusters(numbered, len(groups), dict(scores or {}), inertia)
