"""Partitions against plain loops, hand-worked cases and known distributions."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from composed import composed
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsparse.analysis.partition_plot import partition_figure
from fedsparse.data import partition, splits
from fedsparse.data.dealing import capped_split, deal_classes, dirichlet_logs, fill_small, largest_remainder, softmax

CONF = Path(__file__).parents[2] / "conf" / "partition"
DIGITS = np.random.default_rng(7).integers(0, 10, 1257)
SKEWED = np.repeat([0, 1, 2, 5], [400, 60, 30, 10])  # class 3 and 4 do not occur
quick = settings(derandomize=True, deadline=None, max_examples=60)

EVERY_SAMPLE = {
    "iid": lambda labels, clients, seed: partition.iid(labels, clients, seed),
    "nc2": lambda labels, clients, seed: partition.classes_per_client(labels, clients, 2, seed),
    "dirichlet": lambda labels, clients, seed: partition.dirichlet(labels, clients, 0.3, seed),
    "dirichlet_client": lambda labels, clients, seed: partition.dirichlet_client(labels, clients, 0.3, seed),
    "quantity": lambda labels, clients, seed: partition.quantity(labels, clients, 0.3, seed),
    "unbalanced": lambda labels, clients, seed: splits.unbalanced(labels, clients, seed, (1, 1)),
    "diri": lambda labels, clients, seed: splits.diri(labels, clients, 0.2, seed),
}


def complete(parts, samples):
    """Every sample once, each part sorted."""
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    return sorted(i for part in parts for i in part.tolist()) == list(range(samples))


def table(labels, parts):
    """Class counts of each client, by plain loops."""
    return [Counter(int(labels[i]) for i in part) for part in parts]


@pytest.mark.parametrize("deal", EVERY_SAMPLE.values(), ids=EVERY_SAMPLE)
@pytest.mark.parametrize("labels", [DIGITS, SKEWED], ids=["digits", "skewed"])
@pytest.mark.parametrize("clients", [5, 7, 20])
def test_every_sample_is_used_exactly_once_and_the_seed_decides(deal, labels, clients):
    parts = deal(labels, clients, 3)
    assert len(parts) == clients
    assert complete(parts, len(labels))
    assert all(map(np.array_equal, parts, deal(labels.tolist(), clients, 3)))
    assert not all(map(np.array_equal, parts, deal(labels, clients, 4)))


@pytest.mark.parametrize("deal", [EVERY_SAMPLE[k] for k in ("iid", "dirichlet", "dirichlet_client", "quantity")])
@pytest.mark.parametrize("clients", [1, 500])
def test_one_client_and_as_many_clients_as_samples(deal, clients):
    parts = deal(SKEWED, clients, 0)
    assert complete(parts, 500)
    assert {len(part) for part in parts} == {500 // clients}


@pytest.mark.parametrize("deal", EVERY_SAMPLE.values(), ids=EVERY_SAMPLE)
def test_a_part_comes_from_everywhere_in_the_data(deal):
    labels = np.arange(10_000) % 2
    for part in deal(labels, 6, 0):
        middle, error = part.mean() / 10_000, (1 / 12 / len(part)) ** 0.5
        assert abs(middle - 0.5) < 5 * error
        assert len(part) < 50 or np.unique(np.diff(part)).size > 5  # at random, not in strides


@quick
@given(st.integers(1, 300), st.data())
def test_iid_sizes_differ_by_at_most_one(samples, data):
    clients = data.draw(st.integers(1, samples))
    sizes = [len(part) for part in partition.iid(np.zeros(samples, dtype=int), clients, 1)]
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("deal", [EVERY_SAMPLE["iid"], EVERY_SAMPLE["quantity"]])
def test_iid_and_quantity_have_the_class_mix_of_the_data(deal):
    labels = np.random.default_rng(0).integers(0, 10, 20_000)
    counts = np.array([[c[k] for k in range(10)] for c in table(labels, deal(labels, 5, 0))])
    assert stats.chi2_contingency(counts[counts.sum(axis=1) > 100]).pvalue > 0.001
    unfair = table(labels, partition.dirichlet(labels, 5, 0.5, 0))  # the test can fail
    assert stats.chi2_contingency([[c[k] + 1 for k in range(10)] for c in unfair]).pvalue < 1e-9


@quick
@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_classes_per_client_gives_exactly_nc_classes_in_even_shards(clients, classes, data):
    nc = data.draw(st.integers(1, classes))
    labels = np.random.default_rng(clients).permutation(np.repeat(np.arange(classes) * 3, 60 + np.arange(classes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if clients * nc < classes else "error")
        counts = table(labels, partition.classes_per_client(labels, clients, nc, clients))
    assert all(len(count) == nc for count in counts)
    low, high = clients * nc // classes, -(-clients * nc // classes)
    for size, label in enumerate(sorted(set(labels.tolist())), start=60):
        shards = [count[label] for count in counts if count[label]]
        assert low <= len(shards) <= high
        assert sum(shards) == (size if shards else 0)
        assert not shards or max(shards) - min(shards) <= 1


def test_twenty_clients_of_one_class_leave_eighty_of_a_hundred_classes_out():
    labels = np.repeat(np.arange(100), np.arange(100) + 1)
    with pytest.warns(UserWarning, match="left out") as caught:
        parts = partition.classes_per_client(labels, 20, 1, 0)
    held = {int(labels[i]) for part in parts for i in part}
    assert len(held) == 20
    unused = sum(label + 1 for label in range(100) if label not in held)
    assert f"80 classes with {unused} samples are left out" in str(caught[0].message)
    assert sum(map(len, parts)) == 5050 - unused


def test_classes_are_paired_freely():
    pairs = Counter(tuple(sorted(row)) for row in deal_classes(9000, 10, 2, np.random.default_rng(0)).tolist())
    assert len(pairs) == 45
    assert stats.chisquare(list(pairs.values())).pvalue > 0.001
    seams = Counter(tuple(sorted(row)) for row in deal_classes(9000, 5, 2, np.random.default_rng(0)).tolist())
    assert len(seams) == 10  # clients on a seam included
    assert min(seams.values()) > 700
    blocks = deal_classes(5000, 5, 2, np.random.default_rng(0)).reshape(1000, 5, 2)
    again = (blocks[:, 3] == blocks[:, 2, :1]).any(
        axis=1
    )  # a seam's first class comes again at client 3 or at client 4
    assert abs(again.mean() - 0.5) < 4 * (0.25 / 1000) ** 0.5


@pytest.mark.parametrize("beta", [1e-300, 1e-3, 0.05, 1.0, 1e4, 1e300])
@pytest.mark.parametrize("clients", [1, 20, 250])
@pytest.mark.parametrize("least", [0, 1, 2])
def test_dirichlet_and_quantity_end_at_every_beta(beta, clients, least):
    labels = SKEWED
    for deal in (partition.dirichlet, partition.quantity):
        parts = deal(labels, clients, beta, 0, least)
        assert complete(parts, 500)
        assert min(map(len, parts)) >= least
    sizes = [len(part) for part in partition.dirichlet_client(labels, clients, beta, 0)]
    assert sum(sizes) == 500
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("beta", [0.02, 0.5, 30.0])
def test_dirichlet_draws_have_beta_marginals(beta):
    draws = softmax(dirichlet_logs(np.full(4, beta), (4000, 4), np.random.default_rng(0)))
    np.testing.assert_allclose(draws.sum(axis=1), 1)
    grid = np.array([1e-9, 1e-3, 0.05, 0.25, 0.5, 0.95])
    below = stats.beta(beta, 3 * beta).cdf(grid)  # the marginal of Dir(b, ..., b) over 4 is Beta(b, 3 b)
    for column in draws.T:
        seen = (column[:, None] <= grid).mean(axis=0)
        assert (np.abs(seen - below) <= 4 * (below * (1 - below) / 4000) ** 0.5 + 1e-9).all()
    expected = 0.25 * 0.75 / (4 * beta + 1)
    np.testing.assert_allclose(draws.var(axis=0), expected, rtol=0.12)


def test_dirichlet_spreads_each_class_by_its_own_draw():
    labels = np.repeat(np.arange(300), 200)
    counts = np.array([[c[k] for k in range(300)] for c in table(labels, partition.dirichlet(labels, 5, 0.5, 0, 0))])
    shares = counts / 200
    np.testing.assert_allclose(shares.mean(axis=1), 0.2, atol=4 * (0.2 * 0.8 / 3.5 / 300) ** 0.5)
    np.testing.assert_allclose(shares.var(), 0.2 * 0.8 / 3.5, rtol=0.12)
    even = table(labels, partition.dirichlet(labels, 5, 1e4, 0))
    assert all(abs(count[k] - 40) <= 2 for count in even for k in range(300))


def test_rounding_favours_no_client():
    labels = np.repeat(np.arange(2000), 3)  # three samples over six equal clients: half of one each
    sizes = [len(part) for part in partition.dirichlet(labels, 6, 1e6, 0)]
    assert all(abs(size - 1000) < 5 * (2000 * 0.25) ** 0.5 for size in sizes)


def test_small_clients_are_filled_from_the_largest_by_hand():
    owner = np.repeat([0, 1, 2], [7, 5, 1])
    filled = fill_small(owner, 4, 2, np.random.default_rng(0))
    sizes = np.bincount(filled).tolist()
    assert sorted(sizes[:2]) == [4, 5]  # 3 are needed: both are cut to 4, and one gets one back
    assert sizes[2:] == [2, 2]
    assert filled[12] == 2  # who is short gives nothing
    same = np.repeat([0, 1], [3, 2])
    assert fill_small(same, 2, 2, np.random.default_rng(0)) is same


def hsu(labels, clients, beta, rng):
    """Hsu et al. 2019, one sample at a time; returns the class counts."""
    left = np.bincount(labels).astype(float)
    prior, counts = left / left.sum(), np.zeros((clients, left.size))
    for k in range(clients):
        q = rng.dirichlet(beta * prior)
        for _ in range(len(labels) // clients):
            open_ = np.where(left > 0, q, 0)
            c = rng.choice(left.size, p=open_ / open_.sum())
            counts[k, c] += 1
            left[c] -= 1
    return counts


def test_dirichlet_client_agrees_with_one_sample_at_a_time():
    labels = np.repeat([0, 1, 2], [20, 30, 50])
    rng, plain, ours = np.random.default_rng(0), [], []
    for seed in range(150):
        plain.append(hsu(labels, 5, 2.0, rng))
        ours.append([[c[k] for k in range(3)] for c in table(labels, partition.dirichlet_client(labels, 5, 2.0, seed))])
    for moment in (1, 2):  # by client and class: the last client gets what is left
        a, b = np.array(plain) ** moment, np.array(ours, dtype=float) ** moment
        error = ((a.var(axis=0) + b.var(axis=0)) / 150) ** 0.5
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error + 1e-9).all()


def test_dirichlet_client_goes_from_one_class_to_the_mix_of_the_data():
    labels = np.repeat(np.arange(10), 500)
    alone = table(labels, partition.dirichlet_client(labels, 20, 1e-3, 0))
    assert sum(max(count.values()) == 250 for count in alone) >= 15
    even = table(labels, partition.dirichlet_client(labels, 20, 1e6, 0))
    assert max(max(count.values()) for count in even[:10]) < 25 + 5 * 25**0.5


def test_ratios_by_hand():
    labels = np.repeat([0, 1, 2], [10, 6, 4])
    parts = partition.ratios(labels, 3, [[1, 1, 0], [3, 1, 1], [0, 0, 5]], [0.35, 0.5, 0.2], 0)
    assert [dict(count) for count in table(labels, parts)] == [{0: 4, 1: 3}, {0: 6, 1: 2, 2: 2}, {2: 4}]
    assert all((np.diff(part) > 0).all() for part in parts)  # sorted, no repeats; client 1 and 2 overlap
    assert set(parts[1]) & set(parts[2])
    assert [len(p) for p in partition.ratios(np.zeros(100, dtype=int), 2, [[1], [2]], 0.29, 0)] == [29, 29]


def test_natural_makes_every_user_a_client():
    users = np.array(["c", "a", "b", "a"])
    assert [part.tolist() for part in partition.natural([0, 0, 1, 1], 3, 0, users)] == [[1, 3], [2], [0]]


@quick
@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any), min_size=1, max_size=5), st.data())
def test_largest_remainder_is_within_one_and_gives_the_rest_to_the_largest(rows, data):
    totals = data.draw(st.lists(st.integers(0, 100), min_size=len(rows), max_size=len(rows)))
    for row, total, got in zip(rows, totals, largest_remainder(np.array(rows, float), np.array(totals)), strict=True):
        whole = [total * w // sum(row) for w in row]  # exact, in integers
        rest = sorted(range(3), key=lambda c: (-(total * row[c] % sum(row)), c))[: total - sum(whole)]
        assert got.tolist() == [w + (c in rest) for c, w in enumerate(whole)]


def test_capped_split_hands_the_excess_to_the_other_classes():
    weights = np.array([[6.0, 3, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    got = capped_split(weights, np.array([10, 9, 3]), np.array([4, 4, 4, 4]))
    assert got.tolist() == [[4, 4, 2, 0], [0, 0, 4, 0], [0, 0, 0, 0]]  # 2 over: 1.5 and 0.5, the tie to class 1


def test_client_tests_have_the_mix_of_the_training_parts():
    train, test = np.repeat([0, 1], 50), np.repeat([0, 1], 20)
    parts = [np.arange(0, 30), np.arange(30, 60), np.arange(60, 100), np.array([], dtype=np.int64)]
    tests = partition.client_tests(parts, train, test, 0)
    assert [dict(count) for count in table(test, tests)] == [{0: 12}, {0: 8, 1: 4}, {1: 16}, {}]
    assert complete(tests, 40)  # the pools just suffice: nobody shares
    assert all(map(np.array_equal, tests, partition.client_tests(parts, train, test, 0)))
    assert not all(map(np.array_equal, tests, partition.client_tests(parts, train, test, 1)))


def test_validation_parts_have_the_mix_too_and_draws_of_their_own():
    """Of equal labels the same counts, and by another stream other samples."""
    parts = partition.dirichlet(DIGITS, 20, 0.5, 0)
    tests, vals = (partition.client_tests(parts, DIGITS, DIGITS[:300], 0, validation=v) for v in (False, True))
    assert table(DIGITS, tests) == table(DIGITS, vals)
    assert not any(np.array_equal(one, other) for one, other in zip(tests, vals, strict=True) if len(one) > 4)


def test_client_tests_share_samples_only_when_the_pool_is_used_up():
    parts = partition.classes_per_client(DIGITS, 1000, 1, 0)
    test = np.repeat(np.arange(9), 5)  # class 9 is not in the test set
    tests = partition.client_tests(parts, DIGITS, test, 0)
    for part, own in zip(parts, tests, strict=True):
        label = DIGITS[part[0]]
        assert test[own].tolist() == ([] if label == 9 else [label])
    uses = Counter(i for own in tests for i in own.tolist())
    for label in range(9):
        shared = [uses[i] for i in np.flatnonzero(test == label).tolist()]
        assert max(shared) - min(shared) <= 1


def test_chunks_of_clients_change_no_test_part_and_keep_the_mixes():
    parts = partition.dirichlet_client(DIGITS, 60, 0.5, 0)
    whole = partition.client_tests(parts, DIGITS, DIGITS[:300], 0)
    three = 35  # clients x classes: three clients at a time
    assert all(map(np.array_equal, whole, partition.client_tests(parts, DIGITS, DIGITS[:300], 0, three)))
    chunked = partition.dirichlet_client(DIGITS, 60, 0.5, 0, three)
    assert not all(map(np.array_equal, parts, chunked))  # each chunk draws anew
    assert complete(chunked, 1257)
    tops = [[max(count.values()) for count in table(DIGITS, some)] for some in (parts, chunked)]
    assert stats.ks_2samp(*tops).pvalue > 0.01


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 1000))
def test_client_tests_repeat_nothing_and_take_only_what_the_client_knows(clients, test_size, seed):
    test = np.random.default_rng(seed).integers(0, 6, test_size)
    parts = partition.dirichlet(SKEWED, clients, 0.2, seed)
    for part, own in zip(parts, partition.client_tests(parts, SKEWED, test, seed), strict=True):
        known = set(SKEWED[part].tolist())
        most = sum(int((test == label).sum()) for label in known)
        assert len(set(own.tolist())) == len(own) == min(most, max(1, round(len(part) * test_size / 500)))
        assert set(test[own].tolist()) <= known


BAD = {
    "more clients than samples": (lambda: partition.iid(DIGITS, 3000, 0), "num_clients is 3000 but data has 1257"),
    "no clients": (lambda: partition.quantity(DIGITS, 0, 1.0, 0), "federation.num_clients is 0"),
    "half a client": (lambda: partition.iid(DIGITS, 2.5, 0), "federation.num_clients is 2.5"),
    "true clients": (lambda: partition.iid(DIGITS, True, 0), "federation.num_clients is True"),
    "negative seed": (lambda: partition.iid(DIGITS, 2, -1), "seed is -1"),
    "no labels": (lambda: partition.iid([], 1, 0), r"shape \(0,\)"),
    "one-hot labels": (lambda: partition.iid(np.eye(3, dtype=int), 1, 0), r"shape \(3, 3\)"),
    "float labels": (lambda: partition.iid([0.0, 1.0], 1, 0), "float64"),
    "negative label": (lambda: partition.iid([0, -1], 1, 0), "down to -1"),
    "empty test set": (lambda: partition.client_tests([np.arange(2)], [0, 1], [], 0), "test labels"),
    "nc too large": (lambda: partition.classes_per_client(DIGITS, 5, 50, 0), "nc is 50 but the data has 10 classes"),
    "nc of 0": (lambda: partition.classes_per_client(DIGITS, 5, 0, 0), "partition.nc is 0"),
    "class too small": (lambda: partition.classes_per_client([0] * 9 + [1], 4, 1, 0), "class 1 has 1 samples for 2"),
    "beta 0": (lambda: partition.dirichlet(DIGITS, 5, 0, 0), "partition.beta is 0"),
    "beta nan": (lambda: partition.dirichlet_client(DIGITS, 5, float("nan"), 0), "partition.beta is nan"),
    "beta infinite": (lambda: partition.quantity(DIGITS, 5, float("inf"), 0), "partition.beta is inf"),
    "beta text": (lambda: partition.quantity(DIGITS, 5, "much", 0), "partition.beta is 'much'"),
    "minimum": (lambda: partition.dirichlet(DIGITS, 20, 1, 0, 63), "needs 1260 samples but data has 1257"),
    "no ratios": (lambda: partition.ratios(DIGITS, 2, None, 1, 0), "partition.class_ratios"),
    "no fractions": (lambda: partition.ratios([0, 1], 1, [[1, 1]], None, 0), "partition.fractions"),
    "ratio rows": (lambda: partition.ratios([0, 1], 2, [[1, 1]], 1, 0), "has 1 rows but federation.num_clients is 2"),
    "ratio length": (lambda: partition.ratios([0, 1], 1, [[1]], 1, 0), r"class_ratios\[0\] has 1 numbers"),
    "ratio sign": (lambda: partition.ratios([0, 1], 1, [[1, -1]], 1, 0), r"class_ratios\[0\] is \[1, -1\]"),
    "ratio none": (lambda: partition.ratios([0, 1], 1, [[1, None]], 1, 0), r"class_ratios\[0\] is"),
    "ratio zeros": (lambda: partition.ratios([0, 1], 1, [[0, 0]], 1, 0), "not all of them 0"),
    "fractions": (lambda: partition.ratios([0, 1], 1, [[1, 1]], [1, 1], 0), "has 2 numbers"),
    "fraction above 1": (lambda: partition.ratios([0, 1], 1, [[1, 1]], 1.5, 0), r"fractions\[0\] is 1.5"),
    "fraction too small": (lambda: partition.ratios([0, 1], 1, [[1, 1]], 0.1, 0), r"fractions\[0\] is 0.1"),
    "class runs out": (
        lambda: partition.ratios([0, 0, 0, 1], 2, [[3, 1], [1, 1]], 1.0, 0),
        "client 1 asks for 2 samples of class 1, which has 1",
    ),
    "sampled beta": (lambda: partition.dirichlet_sampled(DIGITS, 5, 0, 0.5, 0), "partition.beta is 0"),
    "sampled more": (lambda: partition.dirichlet_sampled(DIGITS, 5, 1, 1.5, 0), "partition.sample_fraction is 1.5"),
    "sampled none": (lambda: partition.dirichlet_sampled([0, 1], 1, 1, 0.1, 0), "partition.sample_fraction is 0.1"),
    "sampled clients": (lambda: partition.dirichlet_sampled([0, 1], 0, 1, 1, 0), "federation.num_clients is 0"),
    "no users": (lambda: partition.natural(DIGITS, 5, 0), "no user column"),
    "users": (lambda: partition.natural([0, 1, 1], 3, 0, ["a", "b", "b"]), "is 3 but the data has 2 users"),
    "users short": (lambda: partition.natural([0, 1, 1], 2, 0, ["a", "b"]), "one user for each of the 3 samples"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_option_instantiates_and_deals(path):
    clients, classes = (10, 10) if path.stem == "ratios_ten" else (30, 60)  # whose rows are given
    labels = np.random.default_rng(0).integers(0, classes, 6000)
    extra = {"natural": {"users": np.arange(6000) % 30}}.get(path.stem, {})
    config = composed(f"partition={path.stem}").partition
    if path.stem == "ratios":
        config.update({"class_ratios": [[1.0] * 60] * 30, "fractions": 0.5})
    expect = pytest.warns(UserWarning, match="left out") if path.stem == "noniid_nc1" else warnings.catch_warnings()
    with expect:
        parts = instantiate(config)(labels=labels, num_clients=clients, seed=0, **extra)
    assert len(parts) == clients
    if path.stem.startswith("noniid_nc"):
        assert {len(count) for count in table(labels, parts)} == {int(path.stem.removeprefix("noniid_nc"))}


@pytest.mark.parametrize(("clients", "classes", "rows"), [(2, 2, 2), (20, 10, 20), (1000, 100, 1000), (1500, 3, 750)])
def test_the_picture_shows_the_counts(clients, classes, rows):
    labels = np.random.default_rng(0).integers(0, classes, 3000)
    parts = partition.dirichlet(labels, clients, 0.5, 0)
    figure = partition_figure(labels, parts, classes, title="a title")
    figure.savefig(io.BytesIO(), dpi=40)
    heat = figure.axes[0]
    drawn = np.ma.filled(heat.images[0].get_array(), 0)
    counts = np.array([[count[k] for k in range(classes)] for count in table(labels, parts)])
    np.testing.assert_allclose(drawn, counts.reshape(rows, -1, classes).mean(axis=1))
    assert figure.get_suptitle() == "a title"
    numbers = [text.get_text() for text in heat.texts]
    assert numbers == ([str(count) for count in counts.flatten() if count] if clients <= 20 else [])
