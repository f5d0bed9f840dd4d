"""mask_rule=autoflip: deviation, agreement and the original's quantile, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Evidence, Exploration, Sparsity, Updates, choose
from fedsparse.masks.rules import AutoFLIP

SPACE = ParamSpace(["w", "b", "head"], [torch.Size([5]), torch.Size([3]), torch.Size([2])])
# minmax: w 1/4, 0, 1/2, 1, 3/4;  b 0, 1, 0.1;  the head is constant: 0
DEVIATION = torch.tensor([2.0, 1.0, 3.0, 5.0, 4.0, 0.0, 1.0, 0.1, 9.0, 9.0], dtype=torch.float64)
ROW = torch.zeros(10)


def kept(rule, sparsity, observed=DEVIATION, **options):
    return (
        choose(rule, Evidence(SPACE, ROW, sparsity, observed=observed, **options))
        .row(SPACE)
        .nonzero()
        .flatten()
        .tolist()
    )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("minmax", [3, 4, 6, 8, 9]),  # 1, 0.75, 1
        ("rank", [3, 4, 6, 8, 9]),  # 0.9, 0.7, 5/6
        ("robust", [3, 4, 6, 8, 9]),  # w: -1/2, -1, 0, 1, 1/2; b: (-0.1, 0.9, 0) / 0.5
        ("none", [2, 3, 4, 8, 9]),
    ],
)
def test_exactly_k_of_the_normalised_deviation(how, expected):
    assert kept(AutoFLIP(how), Sparsity(5 / 8, always_train="head")) == expected


def test_an_outlier_decides_with_minmax_and_not_with_rank():
    outlier = DEVIATION.clone()
    outlier[3] = 1e12
    sparsity = Sparsity(5 / 8, always_train="head")
    assert kept(AutoFLIP("minmax"), sparsity, outlier) == [3, 6, 7, 8, 9]  # the rest of w is as good as 0
    assert kept(AutoFLIP("rank"), sparsity, outlier) == [3, 4, 6, 8, 9]


def test_min_density_guards_the_tensor_of_an_outlier():
    outlier = DEVIATION.clone()
    outlier[3] = 1e12
    sparsity = Sparsity(0.5, min_density=0.4, always_train="head")
    assert kept(AutoFLIP("minmax"), sparsity, outlier) == [3, 4, 6, 7, 8, 9]
    assert kept(AutoFLIP("minmax"), Sparsity(5 / 8, min_density=0.21, always_train="head"), outlier) == [3, 4, 6, 8, 9]


def test_the_original_keeps_what_lies_strictly_above_the_quantile_of_everything():
    """Ten scores 0 0 0 0 .1 .25 .5 .75 1 1, ratio 0.5: place 4.5, quantile 0.175; five lie above."""
    rule = AutoFLIP(compat="original")
    assert kept(rule, Sparsity(0.5)) == [0, 2, 3, 4, 6]
    assert kept(rule, Sparsity(0.3)) == [0, 2, 3, 4, 6, 7]  # place 2.7: 0; four tie there, six of seven are kept
    assert kept(rule, Sparsity(0.5, always_train="head")) == [0, 2, 3, 4, 6, 8, 9]  # the quantile is the same


@pytest.mark.parametrize("options", [{"scope": "tensor"}, {"unit": "output"}, {"min_density": 0.1}])
def test_the_original_knows_one_quantile_only(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"compat=original .* set sparsity\.{name}=") as caught:
        kept(AutoFLIP(compat="original"), Sparsity(0.5, **options))
    assert "\n" not in str(caught.value)


def test_agreement_is_the_size_of_the_weighted_mean_sign():
    """Three clients of weights 2, 1, 1: signs (+ + -), (- + 0), (- + +)."""
    rule = AutoFLIP(refine=True)
    change = torch.tensor([[0.5, 1e-9, -3.0], [-0.1, 2.0, 0.0], [-7.0, 1.0, 0.2]])
    signs = rule.of_update(change, torch.ones(3, 3))
    assert signs.tolist() == [[1, 1, -1], [-1, 1, 0], [-1, 1, 1]]
    mean = (torch.tensor([2.0, 1.0, 1.0]) @ signs) / 4
    assert mean.tolist() == [0, 1, -0.25]
    assert torch.equal(rule.need(Updates).gather(torch.ones(3), mean), mean)  # the last round alone


def test_agreement_is_added_to_the_deviation():
    updates = torch.zeros(10, dtype=torch.float64)
    updates[1], updates[5] = -0.9, 0.6  # 0 + 0.9 and 0 + 0.6 against 1, 0.75, 1
    sparsity = Sparsity(5 / 8, always_train="head")
    assert kept(AutoFLIP(refine=True), sparsity, updates=updates) == [1, 3, 6, 8, 9]
    assert kept(AutoFLIP(refine=True), sparsity) == [3, 4, 6, 8, 9]  # before the first learning round
    assert kept(AutoFLIP(), sparsity, updates=updates) == [3, 4, 6, 8, 9]


def test_what_did_not_train_counts_with_the_mean_agreement_and_can_come_back():
    """Deviation 0.5 waits, 0.6 trains: agreement 0.1 of it and 0.9 of another one leave it 0.7, the waiting one 1.0."""
    rule, space = AutoFLIP("none", refine=True), ParamSpace(["w"], [torch.Size([3])])
    trained = torch.tensor([-0.9, 0.1], dtype=torch.float64)  # of coordinates 0 and 1
    assert rule.need(Updates).elsewhere(trained) == pytest.approx(0.5)
    updates = torch.tensor([-0.9, 0.1, 0.5], dtype=torch.float64)
    deviation = torch.tensor([0.7, 0.6, 0.5], dtype=torch.float64)
    mask = choose(rule, Evidence(space, torch.zeros(3), Sparsity(1 / 3), observed=deviation, updates=updates))
    assert mask.row(space).tolist() == [True, False, True]


def test_what_it_needs():
    assert AutoFLIP().needs == (Exploration(),)
    assert AutoFLIP(refine=True).needs == (Exploration(), Updates(keep="last", absent="mean"))
    with pytest.raises(ValueError, match="evidence.observed is None"):
        choose(AutoFLIP(), Evidence(SPACE, ROW, Sparsity()))


def test_the_deviation_handed_in_stays_as_it_was():
    observed, updates = DEVIATION.clone(), torch.ones(10, dtype=torch.float64)
    choose(AutoFLIP("none", refine=True), Evidence(SPACE, ROW, Sparsity(), observed=observed, updates=updates))
    assert torch.equal(observed, DEVIATION)
    assert torch.equal(updates, torch.ones(10, dtype=torch.float64))


def test_biases_norms_and_the_head_are_excluded_by_a_list_of_patterns():
    names = ["body.weight", "body.bias", "norm1.weight", "head.weight"]
    space = ParamSpace(names, [torch.Size([4])] * 4)
    config = OmegaConf.create({"head": "head.*", "always": ["${head}", "*.bias", "*norm*"]})
    observed = torch.from_numpy(np.random.default_rng(1).random(16))
    mask = choose(
        AutoFLIP(),
        Evidence(space, torch.zeros(16), Sparsity(0.5, always_train=config.always), observed=observed),
    )
    assert {name: int(marks.sum()) for name, marks in mask.tensors.items()} == dict(
        zip(names, [2, 4, 4, 4], strict=True)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"normalise": "zscore"}, r"mask_rule\.normalise is 'zscore'; it must be minmax"),
        ({"compat": "paper"}, r"mask_rule\.compat is 'paper'; it must be null or original"),
        ({"refine": "yes"}, r"mask_rule\.refine is 'yes'; it must be true or false"),
    ],
)
def test_bad_options_are_refused_by_name(options, says):
    with pytest.raises(ValueError, match=says):
        AutoFLIP(**options)


def test_the_original_with_robust_agrees_with_torchs_own_median_and_quantiles():
    """200 masks, of tensors of even and of odd size."""
    space = ParamSpace(["a", "b", "c"], [torch.Size([6]), torch.Size([5, 2]), torch.Size([7])])
    rule = AutoFLIP("robust", compat="original")
    for seed in range(200):
        found = torch.rand(space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 2
        scores = []
        for part in found.split(space.sizes):
            scores.append((part - part.median()) / (part.quantile(0.75) - part.quantile(0.25)))
        wanted = torch.cat(scores) > torch.cat(scores).quantile(0.5)
        mask = choose(rule, Evidence(space, torch.zeros(space.size), Sparsity(0.5, always_train=[]), observed=found))
        assert torch.equal(mask.row(space), wanted), seed
