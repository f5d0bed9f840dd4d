"""The sampled Dirichlet partition against counts worked out from its definition, and known distributions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from scipy import stats

from fedsparse.data.datasets import digits
from fedsparse.data.partition import dirichlet_sampled
from fedsparse.job.assemble import assemble_problem
from fedsparse.job.config import register_resolvers
from fedsparse.job.shipped import conf_dir

LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 3], [5000, 3000, 2000]))  # class 2 does not occur
TEST = np.random.default_rng(2).permutation(np.repeat([0, 1, 3], [1000, 2000, 3000]))


def counts_of(labels, part):
    held = Counter(int(labels[i]) for i in part)
    return [held[c] for c in (0, 1, 3)]


def test_every_client_samples_its_share_and_the_same_seed_gives_the_same():
    parts = dirichlet_sampled(LABELS, 4, 1.0, 0.75, 0)
    assert [len(part) for part in parts] == [7500] * 4
    assert all(part.dtype == np.int64 and (np.diff(part) >= 0).all() for part in parts)
    assert all(map(np.array_equal, parts, dirichlet_sampled(LABELS.tolist(), 4, 1.0, 0.75, 0)))
    assert not any(map(np.array_equal, parts, dirichlet_sampled(LABELS, 4, 1.0, 0.75, 1)))
    assert not np.array_equal(parts[0], parts[1])


def test_a_client_draws_the_same_whoever_else_there_is():
    assert all(
        map(np.array_equal, dirichlet_sampled(LABELS, 2, 1.0, 0.5, 3), dirichlet_sampled(LABELS, 9, 1.0, 0.5, 3))
    )


def test_samples_are_drawn_with_replacement_and_uniformly_within_a_class():
    (part,) = dirichlet_sampled(np.zeros(1000, dtype=int), 1, 1.0, 1.0, 0)
    assert 600 < len(set(part.tolist())) < 665  # of a thousand draws 1 - 1/e are distinct: 632
    drawn = np.concatenate(dirichlet_sampled(np.zeros(50, dtype=int), 400, 1.0, 1.0, 0))
    assert stats.chisquare(np.bincount(drawn, minlength=50)).pvalue > 0.001


def test_train_and_test_follow_the_same_shares():
    train = dirichlet_sampled(LABELS, 30, 1.0, 0.75, 5)
    test = dirichlet_sampled(TEST, 30, 1.0, 0.75, 5, test=True)
    for own, other in zip(train, test, strict=True):
        assert len(other) == 4500
        # each count is ceil(p m), but the last class, which is cut: at most two above are taken from it
        a, b = (np.array(counts_of(y, part)) / len(part) for y, part in ((LABELS, own), (TEST, other)))
        assert np.abs(a - b).max() <= 3 / 4500
    again = dirichlet_sampled(TEST, 30, 1.0, 0.75, 5)
    assert not any(map(np.array_equal, test, again))  # the same shares, draws of their own


def test_what_is_above_the_size_is_cut_from_the_last_classes():
    fine = dirichlet_sampled(LABELS, 20, 1.0, 1.0, 7)  # 10000 draws each: p to four digits
    coarse = dirichlet_sampled(LABELS, 20, 1.0, 0.001, 7)  # 10 draws each
    for a, b in zip(fine, coarse, strict=True):
        share = np.array(counts_of(LABELS, a)) / 10000  # p_c rounded up to 1/10000
        wanted = [math.ceil(round(p * 10 - 0.001, 3)) for p in share]
        left, expected = 10, []
        for count in wanted:
            expected.append(min(count, left))
            left -= expected[-1]
        assert counts_of(LABELS, b) == expected


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_shares_are_dirichlet(beta):
    parts = dirichlet_sampled(LABELS, 500, beta, 0.5, 0)
    first = np.array([counts_of(LABELS, part)[0] / 5000 for part in parts])
    # a share of Dir(b, b, b) is Beta(b, 2 b); rounding up moves it by 1/5000 at most
    assert stats.kstest(first, stats.beta(beta, 2 * beta).cdf).pvalue > 0.001


def test_a_tiny_beta_gives_one_class_and_no_nan():
    for part in dirichlet_sampled(LABELS, 20, 1e-4, 0.1, 0):
        assert max(counts_of(LABELS, part)) >= 998


def test_a_run_evaluates_its_clients_on_sampled_test_parts():
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=["partition=dirichlet_sampled", "federation.num_clients=5"])
    data, problem = digits(), assemble_problem(cfg)
    parts, tests = problem.parts, problem.tests
    assert [len(part) for part in parts] == [875] * 5  # int(0.75 * 1167)
    assert [len(part) for part in tests] == [270] * 5  # int(0.75 * 360)
    for part, test in zip(parts, tests, strict=True):
        mixes = [np.bincount(y[p], minlength=10) / len(p) for y, p in ((data.train.y, part), (data.test.y, test))]
        assert np.abs(mixes[0] - mixes[1]).max() <= 10 / 270
