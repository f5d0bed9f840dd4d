"""AutoFLIP's partitions and clients' own test samples, against plain loops and numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import composed
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats

from fedsparse.data import partition
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.own_tests import own_tests, with_own_tests
from fedsparse.data.samples import Mapped
from fedsparse.data.splits import diri, unbalanced, user_tests
from fedsparse.job.assemble import assemble_problem
from fedsparse.job.shipped import conf_dir

LABELS = np.random.default_rng(3).integers(0, 10, 2000)


def option(name, **changes):
    return instantiate(OmegaConf.merge(composed(f"partition={name}").partition, changes))


def test_unbalanced_keeps_a_share_of_each_even_part():
    whole, parts = partition.iid(LABELS, 10, 4), option("unbalanced")(labels=LABELS, num_clients=10, seed=4)
    for part, kept in zip(whole, parts, strict=True):
        assert set(kept.tolist()) <= set(part.tolist())
        assert (np.diff(kept) > 0).all()
        assert 190 <= len(kept) <= 198  # of 200: 0.95 x 200 to 0.99 x 200
    assert len({len(kept) for kept in parts}) > 3
    assert all(map(np.array_equal, parts, unbalanced(LABELS, 10, 4)))


def test_unbalanced_by_hand():
    assert [len(p) for p in unbalanced([0] * 100, 1, 0, (0.29, 0.29))] == [29]  # not 28, by the last bit of a float
    assert [len(p) for p in unbalanced([0] * 7, 3, 0, (0.5, 0.5))] == [1, 1, 1]  # parts of 3, 2, 2
    assert [len(p) for p in unbalanced([0] * 3, 3, 0)] == [1, 1, 1]  # 0.95 of one sample is one sample
    shares = [len(p) / 1000 for p in unbalanced([0] * 400_000, 400, 1)]
    assert stats.kstest(shares, stats.uniform(0.95, 0.04).cdf).pvalue > 0.01


def test_patho_gives_each_client_two_classes():
    labels = np.repeat(np.arange(10), 40)
    parts = option("patho")(labels=labels, num_clients=20, seed=0)
    counts = [Counter(labels[part].tolist()) for part in parts]
    assert {len(count) for count in counts} == {2}
    assert {n for count in counts for n in count.values()} == {10}  # 20 x 2 / 10: four shards of ten for each class
    assert {len(np.unique(labels[p])) for p in option("patho", nc=3)(labels=labels, num_clients=20, seed=0)} == {3}


def test_diri_draws_each_mix_from_a_dirichlet_of_equal_numbers():
    labels = np.repeat(np.arange(4), 500)
    first = [np.bincount(labels[diri(labels, 10, 0.5, seed)[0]], minlength=4) / 200 for seed in range(400)]
    # a share is Beta(0.5, 1.5), then 200 samples are drawn: variance V + (0.25 x 0.75 - V) / 200
    spread = 0.25 * 0.75 / (4 * 0.5 + 1)
    np.testing.assert_allclose(np.var(first), spread + (0.1875 - spread) / 200, rtol=0.1)
    assert all(map(np.array_equal, diri(labels, 10, 0.5, 3), partition.dirichlet_client(labels, 10, 2.0, 3)))
    assert {len(part) for part in option("diri")(labels=labels, num_clients=10, seed=0)} == {200}


def test_every_user_gets_the_test_samples_of_the_same_user():
    assert [p.tolist() for p in user_tests([3, 1, 3], [9, 3, 0, 1, 3])] == [[3], [1, 4]]
    assert [p.tolist() for p in user_tests(["f1", "f0"], ["g"])] == [[], []]


def test_own_tests_are_stratified_by_hand():
    labels = np.array([0] * 10 + [1] * 6 + [2] * 4 + [0])
    train, kept = own_tests([np.arange(20), np.array([20]), np.zeros(0, dtype=np.int64)], labels, 0.25, 0)
    assert Counter(labels[kept[0]].tolist()) == {0: 3, 1: 1, 2: 1}  # 5 of 20: 2.5, 1.5, 1; the tie to class 0
    assert [len(part) for part in train] == [15, 1, 0]
    assert [len(part) for part in kept] == [5, 0, 0]  # a quarter of one sample is none
    assert sorted([*train[0], *kept[0]]) == list(range(20))


def test_a_clients_own_tests_depend_on_its_own_stream():
    parts = partition.iid(LABELS, 8, 0)
    train, kept = own_tests(parts, LABELS, 0.2, 0)
    again = own_tests([*parts[:7], parts[7][:5]], LABELS, 0.2, 0)
    assert all(map(np.array_equal, kept[:7], again[1][:7]))
    assert all(map(np.array_equal, train[:7], again[0][:7]))
    assert not all(map(np.array_equal, kept, own_tests(parts, LABELS, 0.2, 1)[1]))
    assert all((np.diff(part) > 0).all() for part in [*train, *kept])


def small(users=None):
    x, y = torch.arange(12.0).view(6, 1, 1, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    train = Split(x, y, users)
    return Dataset(train, Split(x[:2], y[:2]), Split(-x[1:4], y[1:4], None if users is None else users[:3]), 2, "small")


def test_kept_samples_lie_behind_the_test_split():
    users = np.array(list("abcdef"))
    longer, tests = with_own_tests(small(users), [np.array([4, 5]), np.array([], dtype=np.int64), np.array([0])])
    assert [part.tolist() for part in tests] == [[3, 4], [], [5]]
    assert torch.equal(longer.test.x, torch.cat([-small().train.x[1:4], small().train.x[[4, 5, 0]]]))
    assert longer.test.y.tolist() == [1, 0, 1, 0, 1, 0]
    assert longer.test.users.tolist() == ["a", "b", "c", "e", "f", "a"]
    assert longer.own == 3
    assert torch.equal(longer.common_test.x, small().test.x)
    assert longer.common_test.users.tolist() == ["a", "b", "c"]
    assert small().common_test.users is None
    assert len(small().common_test.y) == 3


def test_a_federation_never_trains_on_what_its_clients_keep():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", ["model=mlp", "partition=patho", "data.local_test=0.2"])
    plain, held = (
        assemble_problem(OmegaConf.merge(cfg, {"data": {"local_test": None}})),
        assemble_problem(cfg),
    )
    official = len(plain.dataset.test.y)
    for whole, part, test in zip(plain.parts, held.parts, held.tests, strict=True):
        assert len(test) == len(whole) // 5
        left = sorted(set(whole.tolist()) - set(part.tolist()))
        assert len(part) + len(left) == len(whole)
        assert min(test) >= official
        assert torch.equal(held.dataset.test.x[test], held.dataset.train.x[left])
        classes = held.dataset.test.y[test].tolist()
        assert set(classes) == set(plain.dataset.train.y[whole].tolist())
    assert held.dataset.own == sum(map(len, held.tests))
    assert torch.equal(held.dataset.common_test.x, plain.dataset.test.x)


def test_a_run_with_own_tests_ends(run_in):
    summary, _ = run_in("own", "data.local_test=0.3", "federation.rounds=2")
    assert 0 <= summary["client/acc_worst10"] <= summary["client/acc_mean"] <= 1


def mapped(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 2, 2), dtype=np.uint8))
    split = Split(Mapped(tmp_path / "x.npy"), torch.tensor([0, 1, 0, 1]))
    return Dataset(split, split, split, 2, "mapped")


BAD = {
    "share of 1": (lambda _: own_tests([np.arange(3)], [0, 1, 0], 1, 0), "data.local_test is 1;"),
    "no share": (lambda _: own_tests([np.arange(3)], [0, 1, 0], 0.0, 0), "data.local_test is 0.0;"),
    "word": (lambda _: own_tests([np.arange(3)], [0, 1, 0], "some", 0), "data.local_test is 'some'"),
    "shared": (lambda _: own_tests([np.arange(3), np.arange(1)], [0, 1, 0], 0.5, 0), "share no samples"),
    "repeated": (lambda _: own_tests([np.array([1, 1])], [0, 1, 0], 0.5, 0), "share no samples"),
    "on the disk": (lambda path: with_own_tests(mapped(path), [np.arange(1)]), "data.stream=false"),
    "keep one": (lambda _: unbalanced([0, 1], 1, 0, [0.5]), r"partition.keep is \[0.5\]"),
    "keep turned": (lambda _: unbalanced([0, 1], 1, 0, [0.9, 0.5]), r"partition.keep is \[0.9, 0.5\]"),
    "keep nothing": (lambda _: unbalanced([0, 1], 1, 0, [0, 0.5]), "above 0 and at most 1"),
    "keep word": (lambda _: unbalanced([0, 1], 1, 0, "ab"), "partition.keep is 'ab'"),
    "keep number": (lambda _: unbalanced([0, 1], 1, 0, 0.9), "partition.keep is 0.9"),
    "concentration": (lambda _: diri([0, 1], 1, -1, 0), "partition.concentration is -1"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(tmp_path, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def test_test_figures_leave_out_what_is_clients_own(run_in):
    still = ["federation.rounds=1", "optimizer.lr=1e-12", "head.init=random"]  # both evaluate the start
    plain, own = run_in("plain", *still)[0], run_in("own", *still, "data.local_test=0.3")[0]
    assert own["test/loss"] == pytest.approx(plain["test/loss"], rel=1e-6)
    assert own["test/acc"] == plain["test/acc"]
    assert own["client/acc_mean"] != plain["client/acc_mean"]
