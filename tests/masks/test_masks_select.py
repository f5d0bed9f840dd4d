"""Selection against plain sorting loops: exact k, ties to the lowest index, scopes, units, warnings, errors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Sparsity, select, top_fraction, topk

SPACE = ParamSpace(
    ["cls", "fc.weight", "fc.bias", "scale", "head.weight", "head.bias"],
    [torch.Size(s) for s in ([1, 3], [4, 5], [4], [1], [2, 4], [2])],
)  # 3 + 20 + 4 + 1 + 8 + 2 coordinates
GENERAL = [(1.0, False), (0.7, True), (0.37, False), (0.0, True), (0.5, True)]


def plain_top(scores, fraction, largest):
    """Sort pairs (score, index) and mark the first k."""
    k = math.floor(fraction * len(scores) + 0.5)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if largest else scores[i], i))
    return [i in set(order[:k]) for i in range(len(scores))]


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, math.inf]), max_size=30),
    st.floats(0, 1),
    st.booleans(),
)
def test_top_fraction_equals_a_plain_sort_with_many_ties(scores, fraction, largest):
    found = top_fraction(torch.tensor(scores, dtype=torch.float64), fraction, largest=largest)
    assert found.tolist() == plain_top(scores, fraction, largest)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, math.inf]), min_size=40, max_size=300)
    | st.lists(st.floats(-9, 9, width=32), min_size=40, max_size=300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([(3, 0.01), (10, 0.1)]),
)
def test_the_search_from_a_sample_equals_a_plain_sort(scores, place, cut, options):
    """Over two tensors; a sample of three is often wrong, and then all scores are searched."""
    k, first = 1 + round(place * (len(scores) - 1)), round(cut * len(scores))
    parts = [torch.tensor(scores[:first]), torch.tensor(scores[first:])]
    assert float(topk.smallest(parts, k, *options)) == sorted(scores)[k - 1]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("levels", [5, 2**24])
def test_many_scores_are_searched_from_a_sample(levels, largest):
    scores = np.random.default_rng([levels]).integers(0, levels, 1_200_000).astype(np.float32)
    assert len(scores) > 4 * topk.SAMPLE
    order = np.argsort(-scores if largest else scores, kind="stable")
    for fraction in (0.001, 0.37, 0.9):
        found = top_fraction(torch.from_numpy(scores), fraction, largest=largest)
        assert np.array_equal(found.nonzero().squeeze(1).numpy(), np.sort(order[: topk.count(fraction, len(scores))]))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_ties_run_on_over_several_tensors(k):
    parts = [
        torch.tensor([1.0, 0.0]),
        torch.zeros(0),
        torch.tensor([0.0, 2.0, 0.0]),
        torch.tensor([0.0, 0.0, 5.0, 7.0]),
    ]
    marks, tied = topk.mark(parts, k, largest=False)
    whole = torch.cat(parts).tolist()
    assert torch.cat(marks).tolist() == plain_top(whole, k / 9, False)
    assert tied == (5 if k < 5 else 0)
    assert topk.mark(parts, k, largest=True)[1] == (5 if 4 < k < 9 else 0)


def test_scores_of_half_precision_are_ordered_too():
    scores = torch.tensor([0.5, -2.0, 3.0, 0.5, 1.0])
    for dtype in (torch.float16, torch.bfloat16):
        assert top_fraction(scores.to(dtype), 0.6).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_a_power_of_the_density_leads_up_to_it(power):
    found = select(torch.arange(38.0), SPACE, Sparsity(0.9, always_train="head.*"), largest=True, power=power)
    assert int(found[:28].sum()) == math.floor(0.1**power * 28 + 0.5)
    assert found[28:].all()


@pytest.mark.parametrize(("fraction", "largest"), GENERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 11), (2, 3, 40), (0, 4), (2, 0)])
def test_top_fraction_works_row_by_row(fraction, largest, dtype, shape):
    scores = torch.from_numpy(np.random.default_rng([1]).integers(0, 9, shape)).to(dtype)
    found = top_fraction(scores, fraction, largest=largest)
    assert found.shape == scores.shape
    assert found.dtype == torch.bool
    for row, marks in zip(scores.reshape(-1, max(1, shape[-1])), found.reshape(-1, max(1, shape[-1])), strict=True):
        assert marks.tolist() == plain_top(row.tolist(), fraction, largest)


def test_top_fraction_leaves_its_input_alone_and_takes_scores_with_gradients():
    scores = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    assert top_fraction(scores, 1 / 3).tolist() == [True, False, False]
    assert scores.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_top_fraction_refuses_a_fraction_outside_0_1(fraction):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        top_fraction(torch.ones(3), fraction)


def test_top_fraction_refuses_nan_and_scalars():
    with pytest.raises(ValueError, match="NaN"):
        top_fraction(torch.tensor([1.0, math.nan]), 1.0)
    with pytest.raises(ValueError, match="at least one dimension"):
        top_fraction(torch.tensor(1.0), 0.5)


@pytest.mark.parametrize("ratio", ["abc", "0.5", None, 1.0, -0.1, math.nan, math.inf, True, [0.5]])
def test_sparsity_refuses_a_ratio_in_one_line(ratio):
    with pytest.raises(
        ValueError, match=r"^sparsity\.ratio is .*; it must be a finite number of 0 or more and below 1$"
    ):
        Sparsity(ratio)


@pytest.mark.parametrize(
    "option", [{"mode": "melt"}, {"scope": "layer"}, {"unit": "row"}, {"always_train": None}, {"always_train": [1]}]
)
def test_sparsity_refuses_other_options_by_name(option):
    with pytest.raises(ValueError, match=rf"^sparsity\.{next(iter(option))} "):
        Sparsity(**option)


def test_sparsity_takes_the_lists_and_numbers_of_a_config():
    omegaconf = pytest.importorskip("omegaconf")
    sparsity = Sparsity(np.float64(0.8), always_train=omegaconf.OmegaConf.create(["head.*"]))
    assert sparsity.density == pytest.approx(0.2)
    assert Sparsity(0).density == 1
    assert select(torch.arange(38.0), SPACE, sparsity, largest=True)[28:].all()


def plain_select(scores, space, ratio, scope, unit, always, largest):
    """Build the units as lists of coordinates, sort them, take them while they fit."""
    pools = {}
    for name, shape, size, start in zip(space.names, space.shapes, space.sizes, space.offsets, strict=True):
        if name.startswith(always):
            continue
        first = shape[0] if len(shape) else 1
        stem = name.removesuffix(".weight").removesuffix(".bias") if unit == "output" else name
        for i in range(size):
            key = i // (size // first) if unit == "output" else i
            pool = pools.setdefault("all" if scope == "global" else stem, {})
            pool.setdefault((stem, key), []).append(start + i)
    kept = {i for n, s, o in zip(space.names, space.sizes, space.offsets, strict=True) if n.startswith(always)
            for i in range(o, o + s)}  # fmt: skip
    for pool in pools.values():
        units = list(pool.values())
        budget = math.floor((1 - ratio) * sum(len(u) for u in units) + 0.5)
        mean = [math.fsum(scores[i] for i in unit) / len(unit) for unit in units]
        for u in sorted(range(len(units)), key=lambda u: (-mean[u] if largest else mean[u], u)):
            if len(units[u]) > budget:
                break
            budget -= len(units[u])
            kept |= set(units[u])
    return [i in kept for i in range(space.size)]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("unit", ["coordinate", "output"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 0.95])
def test_select_equals_plain_loops(ratio, scope, unit, largest):
    rng = np.random.default_rng([2, int(100 * ratio)])
    for always in ("head.", "nothing"):
        scores = rng.permutation(38).astype(float) ** 2
        sparsity = Sparsity(ratio, scope=scope, unit=unit, always_train=f"{always}*")
        found = select(torch.from_numpy(scores), SPACE, sparsity, largest=largest)
        assert found.tolist() == plain_select(scores, SPACE, ratio, scope, unit, always, largest)


def test_select_counts_exactly_and_never_counts_always_train():
    scores = torch.from_numpy(np.random.default_rng([3]).random(38))
    found = select(scores, SPACE, Sparsity(0.8, always_train=["head.*"]), largest=False)
    assert found[28:].all()
    assert int(found[:28].sum()) == 6  # floor(0.2 * 28 + 0.5)


def test_an_output_unit_is_a_row_of_the_weight_with_its_bias():
    space = ParamSpace(["fc.weight", "fc.bias", "other.bias"], [torch.Size(s) for s in ([2, 3], [2], [2])])
    # Row 0 has the larger weights, but with its bias row 1 has the larger mean: (0+0+3+9)/4 > (2+2+2+0)/4.
    scores = torch.tensor([2.0, 2, 2, 0, 0, 3, 0, 9, 1, 0.5])
    found = select(scores, space, Sparsity(0.5, unit="output"), largest=True)  # budget 5: unit of 4 fits, the next not
    assert found.tolist() == [False] * 3 + [True] * 3 + [False, True] + [False, False]


def test_a_bias_whose_weight_always_trains_stands_alone():
    space = ParamSpace(["fc.weight", "fc.bias"], [torch.Size([2, 3]), torch.Size([2])])
    sparsity = Sparsity(0.5, unit="output", always_train="*.weight")
    found = select(torch.arange(8.0), space, sparsity, largest=True)
    assert found.tolist() == [True] * 6 + [False, True]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_scalar_weight_and_its_bias_are_one_output_unit(scope):
    """Two coordinates, which a budget of floor(0.5 * 2 + 0.5) = 1 does not hold, whatever their scores."""
    space = ParamSpace(["gain.weight", "gain.bias"], [torch.Size([]), torch.Size([1])])
    sparsity = Sparsity(0.5, scope=scope, unit="output")
    assert select(torch.tensor([9.0, 1.0]), space, sparsity, largest=True).tolist() == [False, False]
    assert select(torch.tensor([9.0, 1.0]), space, Sparsity(0.2, unit="output"), largest=True).tolist() == [True, True]


def test_nothing_counted_trains_everything():
    for unit in ("coordinate", "output"):
        found = select(torch.zeros(38), SPACE, Sparsity(0.9, unit=unit, always_train="*"), largest=True)
        assert found.all()


def test_ties_over_one_percent_at_the_threshold_warn_with_their_share():
    space = ParamSpace(["w"], [torch.Size([400])])
    scores = torch.arange(400.0)
    scores[198:203] = 200.0  # five of 400 stand on both sides of the line at 200: 1.25 %
    with pytest.warns(UserWarning, match=r"1\.2% of the scores tie .* the mask is arbitrary .*: raise calib") as caught:
        found = select(scores, space, Sparsity(0.5), largest=False)
    assert caught[0].filename == __file__
    assert found.tolist() == [True] * 200 + [False] * 200
    scores[202] = 202.0  # exactly 1 % does not warn
    assert int(select(scores, space, Sparsity(0.5), largest=False).sum()) == 200


def test_ties_that_the_line_does_not_cut_do_not_warn():
    scores = torch.tensor([0.0, 1.0]).repeat_interleave(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = select(scores, ParamSpace(["w"], [torch.Size([400])]), Sparsity(0.5), largest=True)
    assert found.tolist() == [False] * 200 + [True] * 200


def test_tied_units_warn_by_their_coordinates():
    space = ParamSpace(["w"], [torch.Size([4, 10])])
    scores = torch.tensor([3.0, 2.0, 2.0, 0.0]).repeat_interleave(10)
    with pytest.warns(UserWarning, match=r"50\.0% of the scores tie"):
        found = select(scores, space, Sparsity(0.5, unit="output"), largest=True)
    assert found.tolist() == [True] * 20 + [False] * 20


@pytest.mark.parametrize("unit", ["coordinate", "output"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_equal_scores_are_refused_only_where_a_choice_must_be_made(scope, unit):
    scores = torch.full((38,), 0.1)
    scores[28:] = 7.0  # the head is not counted
    with pytest.raises(ValueError, match="all scores are equal") as caught:
        select(scores, SPACE, Sparsity(0.5, scope=scope, unit=unit, always_train="head.*"), largest=True)
    assert "\n" not in str(caught.value)
    assert select(scores, SPACE, Sparsity(0.0, scope=scope, unit=unit, always_train="head.*"), largest=True).all()


def test_one_tensor_of_equal_scores_is_no_error():
    scores = torch.arange(38.0)
    scores[23:27] = 0.0  # a bias of zeros
    with pytest.warns(UserWarning, match="tie"):
        found = select(scores, SPACE, Sparsity(0.5, scope="tensor"), largest=True)
    assert found[23:27].tolist() == [True, True, False, False]


def test_select_refuses_scores_of_another_size_and_nan():
    with pytest.raises(ValueError, match=r"shape \(38,\), not \(5,\)"):
        select(torch.ones(5), SPACE, Sparsity(), largest=True)
    scores = torch.arange(38.0)
    scores[3] = math.nan
    for unit in ("coordinate", "output"):
        with pytest.raises(ValueError, match="NaN"):
            select(scores, SPACE, Sparsity(unit=unit), largest=True)
