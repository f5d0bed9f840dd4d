"""Clusters by adapters, against dense vectors, scikit-learn and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.metrics.pairwise import cosine_similarity

from fedsparse.federation.clusters import cluster, cluster_as_original, cosines, elbow, embed, gram, gram_of_updates
from fedsparse.federation.lowrank import Pair

SHAPES = {"q": (2, 5, 4), "v": (3, 5, 6)}  # rank, in, out


def members(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            layer: Pair(torch.randn(r, wide, generator=generator), torch.randn(high, r, generator=generator))
            for layer, (r, wide, high) in SHAPES.items()
        }
        for _ in range(count)
    ]


def dense(member):
    return torch.cat([(pair.B.double() @ pair.A.double()).flatten() for pair in member.values()])


def test_inner_products_are_those_of_dense_vectors():
    found = members(4)
    vectors = torch.stack([dense(member) for member in found])
    inner = gram_of_updates(found)
    torch.testing.assert_close(inner, vectors @ vectors.T)
    torch.testing.assert_close(inner, gram(list(vectors)))
    torch.testing.assert_close(cosines(inner), torch.from_numpy(cosine_similarity(vectors.numpy())))


def test_what_points_the_other_way_is_not_alike():
    (one,) = members(1)
    other = {layer: Pair(pair.A, -pair.B) for layer, pair in one.items()}
    torch.testing.assert_close(cosines(gram_of_updates([one, other]))[0, 1], torch.tensor(-1.0, dtype=torch.float64))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_points_have_the_distances_of_dense_vectors(metric):
    found = members(5)
    vectors = torch.stack([dense(member) for member in found])
    if metric == "cosine":
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    points = torch.from_numpy(embed(gram_of_updates(found), metric))
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(vectors, vectors))


@pytest.mark.parametrize(
    ("inertias", "k"), [([100, 30, 8, 6, 5], 2), ([100, 80, 20, 15, 12], 3), ([9, 4], 2), ([5], 1)]
)
def test_the_elbow_counts_one_cluster_too(inertias, k):
    assert elbow(inertias) == k


def families(spread=0.05, seed=0):
    """Six points in three families, in an order that is no family's."""
    rng = np.random.default_rng(seed)
    truth = np.array([0, 1, 2, 1, 0, 2])
    return 3 * np.eye(3)[truth] + spread * rng.normal(size=(6, 3)), truth


@pytest.mark.parametrize("method", ["kmeans", "agglomerative"])
@pytest.mark.parametrize("k", ["silhouette", "elbow", 3])
def test_families_are_found(method, k):
    points, truth = families()
    found = cluster(points, method, k)
    assert found.k == 3
    assert adjusted_rand_score(truth, found.labels) == 1
    assert found.labels == (0, 1, 2, 1, 0, 2)
    assert found.inertia == pytest.approx(KMeans(3, n_init=10, random_state=0).fit(points).inertia_)


def test_scores_are_those_of_scikit_learn():
    points, _ = families(spread=0.8, seed=3)
    by_width, by_bend = cluster(points, k="silhouette"), cluster(points, k="elbow")
    assert list(by_width.scores) == [2, 3, 4, 5]
    assert list(by_bend.scores) == [1, 2, 3, 4, 5, 6]
    for k, score in by_width.scores.items():
        labels = KMeans(k, n_init=10, random_state=0).fit_predict(points)
        assert score == pytest.approx(silhouette_score(points, labels))
    assert by_bend.scores[1] == pytest.approx(((points - points.mean(0)) ** 2).sum())
    assert by_bend.scores[6] == pytest.approx(0)


def test_few_members():
    assert cluster(np.zeros((2, 2))).labels == (0, 0)  # of two there is nothing to choose
    assert cluster(np.eye(3), k="silhouette").k == 2
    assert cluster(np.ones((4, 2)), k=1).labels == (0, 0, 0, 0)


def test_b_tells_families_that_share_a():
    """As in FedSA, where A is one for all: by A there is nothing to tell, by B and by the update all of it."""
    points, truth = families()
    shared = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    found = [{"q": Pair(shared, torch.from_numpy(np.outer(point, [1.0, 0.5])))} for point in points]
    factors = [gram([member["q"][which].flatten() for member in found]) for which in (0, 1)]
    for inner in (factors[1], gram_of_updates(found)):
        assert adjusted_rand_score(truth, cluster(embed(inner, "cosine")).labels) == 1
    torch.testing.assert_close(cosines(factors[0]), torch.ones(6, 6, dtype=torch.float64))


@pytest.mark.parametrize(("count", "tried", "possible"), [(2, [2], {2}), (4, [2, 3], {2}), (5, [2, 3, 4], {3})])
def test_the_originals_elbow_is_two_of_four_and_never_of_five(count, tried, possible):
    for seed in range(5):
        vectors = np.random.default_rng(seed).normal(size=(count, 7))
        found = cluster_as_original(vectors, 1)
        assert list(found.scores) == tried
        assert found.k in possible


def test_the_original_looks_at_every_third_value_of_ten_thousand():
    vectors = np.zeros((4, 10000))
    vectors[:, 1::3] = np.random.default_rng(0).normal(size=(4, 3333))  # what it does not look at
    vectors[:, ::3] += np.array([0.0, 5, 0, 5])[:, None]
    assert cluster_as_original(vectors, 3).labels == (0, 1, 0, 1)
    assert cluster_as_original(vectors, 3).inertia == 0


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: embed(torch.full((2, 2), float("nan"))), "adapters of a department are not finite"),
        (lambda: embed(torch.eye(2), "angle"), "mixing.metric is 'angle'"),
        (lambda: cluster(np.eye(3), k=4), "mixing.k is 4; it must be a whole number from 1 to 3"),
        (lambda: cluster(np.eye(3), k="gap"), "mixing.k is 'gap'; it must be silhouette or elbow"),
        (lambda: cluster(np.eye(3), "dbscan"), "mixing.method is 'dbscan'"),
        (lambda: cluster(np.eye(3), k_range=(1, 2)), "mixing.k_range is 1"),
    ],
)
def test_what_cannot_be_clustered_is_refused(call, line):
    with pytest.raises(ValueError, match=line):
        call()
