"""AutoFLIP's deviation, normalisations and quantile against loops, scikit-learn, scipy and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.preprocessing import MinMaxScaler, RobustScaler

from fedsparse.core.space import ParamSpace
from fedsparse.masks import above_quantile
from fedsparse.masks.deviations import deviation, normalise
from fedsparse.masks.quantiles import quantile

SPACE = ParamSpace(
    ["a.weight", "a.bias", "scalar", "none", "head"], [torch.Size(s) for s in ([4, 5], [4], [], [0], [7])]
)
MANY = 1_200_000  # more than four times as many as are sampled, and more than a piece
HOWS = ["minmax", "robust", "rank", "none"]


def rows(clients, size, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng([clients, size]).normal(size=(clients, size))).to(dtype)


# --- deviation


def test_deviation_by_hand():
    theta, anchor = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]]), torch.tensor([1.0, 1.0, 0.0])
    assert deviation(theta, anchor).tolist() == [2.0, 2.5, 0.0]  # (0 + 4) / 2, (1 + 4) / 2
    assert deviation(theta, anchor, torch.tensor([3, 1])).tolist() == [1.0, 1.75, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_deviation_equals_a_plain_loop(dtype):
    theta, anchor = rows(5, 11, dtype), rows(1, 11, dtype)[0]
    weight = torch.tensor([3.0, 0.0, 1.0, 7.0, 2.5])
    found = deviation(theta, anchor, weight)
    assert found.dtype == dtype
    for j in range(11):
        total = math.fsum(
            float(w) * (float(row[j]) - float(anchor[j])) ** 2 for w, row in zip(weight, theta, strict=True)
        )
        np.testing.assert_allclose(float(found[j]), total / 13.5, rtol={2: 1e-3, 4: 1e-6, 8: 1e-13}[dtype.itemsize])


def test_small_deviations_of_large_values_are_not_lost_to_float32():
    """The differences are exact in float64; their mean of a million clients' worth of weight too."""
    theta = torch.tensor([[1.0 + 2**-23], [1.0]])
    assert deviation(theta, torch.ones(1), torch.tensor([1e6, 1.0])).item() == pytest.approx(2**-46, rel=1e-5)


def test_a_client_of_weight_zero_cannot_poison():
    theta = torch.tensor([[math.nan, math.inf], [2.0, 3.0]])
    assert deviation(theta, torch.zeros(2), torch.tensor([0.0, 5.0])).tolist() == [4.0, 9.0]
    assert deviation(theta, torch.zeros(2)).isfinite().tolist() == [False, False]  # with weight it shows


@pytest.mark.parametrize(
    ("theta", "anchor", "weight", "says"),
    [
        ((2, 3), (4,), None, r"rows \(K, P\) and a start \(P,\), not \(2, 3\) and \(4,\)"),
        ((3,), (3,), None, r"rows \(K, P\)"),
        ((2, 3), (3,), [1.0], "one weight for each of 2 clients"),
        ((2, 3), (3,), [1.0, -1.0], "finite and not negative"),
        ((2, 3), (3,), [1.0, math.nan], "finite and not negative"),
        ((2, 3), (3,), [1.0, math.inf], "finite and not negative"),
        ((2, 3), (3,), [0.0, 0.0], "at least one client"),
        ((0, 3), (3,), None, "at least one client"),
    ],
)
def test_what_has_no_mean_is_refused_in_one_line(theta, anchor, weight, says):
    with pytest.raises(ValueError, match=says) as caught:
        deviation(torch.ones(theta), torch.ones(anchor), None if weight is None else torch.tensor(weight))
    assert "\n" not in str(caught.value)


# --- normalisations


def oracle(part, how):
    column = part.reshape(-1, 1)
    if how == "minmax":
        return MinMaxScaler().fit_transform(column).ravel()
    if how == "robust":
        return RobustScaler().fit_transform(column).ravel()
    return part if how == "none" else (rankdata(part) - 0.5) / len(part)


def parts(scores):
    return [scores[o : o + s] for o, s in zip(SPACE.offsets, SPACE.sizes, strict=True) if s]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("levels", [3, 10**6])
def test_each_tensor_equals_scikit_learn_and_scipy(how, levels):
    scores = np.random.default_rng([levels]).integers(0, levels, SPACE.size).astype(float)
    scores[20:24] = 7.0  # a constant tensor
    given = torch.from_numpy(scores)
    found = normalise(given, SPACE, how)
    np.testing.assert_allclose(
        found, np.concatenate([oracle(part, how) for part in parts(scores)]), rtol=1e-12, atol=1e-14
    )
    assert given.tolist() == scores.tolist()
    assert found.data_ptr() != given.data_ptr()


def test_normalisations_by_hand():
    space = ParamSpace(["w", "b"], [torch.Size([5]), torch.Size([3])])
    scores = torch.tensor([4.0, 0.0, 2.0, 2.0, 12.0, 5.0, 5.0, 5.0])
    assert normalise(scores, space, "minmax").tolist() == pytest.approx([1 / 3, 0, 1 / 6, 1 / 6, 1, 0, 0, 0])
    assert normalise(scores, space, "robust").tolist() == [1, -1, 0, 0, 5, 0, 0, 0]  # median 2, q75 - q25 = 4 - 2
    assert normalise(scores, space, "rank").tolist() == pytest.approx([0.7, 0.1, 0.4, 0.4, 0.9, 0.5, 0.5, 0.5])
    assert normalise(scores, space, "none").tolist() == scores.tolist()


def test_squared_deviations_far_below_one_are_scaled_all_the_same():
    """scikit-learn leaves a width below ten epsilons as it is: squares of small steps would not be scaled."""
    space = ParamSpace(["w"], [torch.Size([5])])
    scores = torch.tensor([0.0, 1, 2, 3, 4], dtype=torch.float64) * 1e-30
    assert normalise(scores, space, "minmax").tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert normalise(scores, space, "robust").tolist() == [-1, -0.5, 0, 0.5, 1]


def test_differences_beyond_the_largest_number_are_scaled_too():
    space = ParamSpace(["w"], [torch.Size([3])])
    scores = torch.tensor([-1.5e308, 0.0, 1.5e308], dtype=torch.float64)
    assert normalise(scores, space, "minmax").tolist() == [0, 0.5, 1]
    assert normalise(scores, space, "robust").tolist() == [-1, 0, 1]


def test_infinite_scores_count_as_the_largest_finite_one_or_keep_their_rank():
    space = ParamSpace(["w", "all"], [torch.Size([5]), torch.Size([2])])
    scores = torch.tensor([0.0, math.inf, 1.0, 2.0, -math.inf, math.inf, math.inf])
    assert normalise(scores, space, "minmax").tolist() == [0, 1, 0.5, 1, 0, 0, 0]
    assert normalise(scores, space, "robust").tolist() == [-0.5, 0.5, 0, 0.5, -0.5, 0, 0]
    assert normalise(scores, space, "rank").tolist() == pytest.approx([0.3, 0.9, 0.5, 0.7, 0.1, 0.5, 0.5])
    assert normalise(scores, space, "none").tolist() == scores.tolist()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_keep_their_dtype(how, dtype):
    found = normalise(torch.arange(SPACE.size).to(dtype), SPACE, how)
    assert found.dtype == dtype
    expected = np.concatenate([oracle(part, how) for part in parts(np.arange(float(SPACE.size)))])
    np.testing.assert_allclose(found.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how", HOWS)
def test_pieces_and_samples_do_not_show(how):
    """A tensor so large that quantiles are searched from a sample, and scores are scaled a piece at a time."""
    scores, space = rows(1, MANY)[0], ParamSpace(["w"], [torch.Size([MANY])])
    np.testing.assert_allclose(normalise(scores, space, how), oracle(scores.numpy(), how), rtol=1e-12, atol=1e-14)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(
        ValueError, match=r"^mask_rule\.normalise is 'zscore'; it must be minmax, robust, rank or none$"
    ):
        normalise(torch.ones(SPACE.size), SPACE, "zscore")
    with pytest.raises(ValueError, match=r"shape \(32,\), not \(3,\)"):
        normalise(torch.ones(3), SPACE, "minmax")
    with pytest.raises(ValueError, match="NaN"):
        normalise(torch.full((SPACE.size,), math.nan), SPACE, "none")


# --- the strict quantile


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)
    | st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.floats(0, 1) | st.sampled_from([0.1, 0.25, 0.29, 0.3, 0.5, 0.7, 0.9]),
)
def test_above_quantile_equals_numpy(scores, fraction):
    values = np.array(scores)
    assert (
        above_quantile(torch.from_numpy(values), fraction).tolist() == (values > np.quantile(values, fraction)).tolist()
    )


@pytest.mark.parametrize("levels", [5, 10**9])
def test_above_quantile_of_many_scores_equals_numpy(levels):
    values = np.random.default_rng([levels]).integers(0, levels, MANY).astype(float)
    for fraction in (0.0, 0.1, 0.29, 0.5, 0.9, 1.0):
        found = above_quantile(torch.from_numpy(values), fraction).numpy()
        assert np.array_equal(found, values > np.quantile(values, fraction))


def test_above_quantile_of_any_shape_and_at_its_ends():
    scores = torch.tensor([[5.0, 1.0], [3.0, 3.0]])
    assert above_quantile(scores, 0.0).tolist() == [[True, False], [True, True]]
    assert above_quantile(scores, 0.5).tolist() == [[True, False], [False, False]]
    assert not above_quantile(scores, 1.0).any()
    assert above_quantile(torch.zeros(2, 0), 0.5).shape == (2, 0)


def test_neighbouring_float32_scores_are_told_apart():
    """Halfway between them float32 has no number: rounded to the upper one, nothing would stand above."""
    scores = torch.tensor([1.0, 1.0 + 2**-23])
    assert above_quantile(scores, 0.5).tolist() == [False, True]


def test_infinite_scores_are_ordered_like_others():
    scores = torch.tensor([-math.inf, 0.0, 1.0, math.inf])
    assert above_quantile(scores, 0.5).tolist() == [False, False, True, True]
    assert above_quantile(scores, 0.1).tolist() == [False, True, True, True]
    assert not above_quantile(scores, 0.9).any()


def test_above_quantile_refuses_what_has_no_quantile():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not 1.5"):
        above_quantile(torch.ones(3), 1.5)
    with pytest.raises(ValueError, match="NaN"):
        above_quantile(torch.tensor([1.0, math.nan]), 0.5)


@pytest.mark.soak
@pytest.mark.slow
def test_22_million_scores_of_one_tensor():
    """Beyond 16,777,216, where torch.quantile stops."""
    n = 22_000_000
    scores = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64).square()
    ordered = scores.sort().values
    place = 0.7 * (n - 1)
    below = math.floor(place)
    edge = torch.lerp(ordered[below], ordered[below + 1], place - below)
    assert torch.equal(above_quantile(scores, 0.7), scores > edge)
    space = ParamSpace(["w"], [torch.Size([n])])
    ranks = normalise(scores, space, "rank")
    assert torch.equal(ranks[scores.argsort()], (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    robust = normalise(scores, space, "robust")
    assert float(robust.median()) == pytest.approx(0, abs=1e-6)
    assert normalise(scores, space, "minmax").aminmax() == (0, 1)


def test_the_originals_robust_takes_the_lower_median():
    space = ParamSpace(["even", "odd"], [torch.Size([4]), torch.Size([3])])
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0, 5.0, 1.0, 3.0])
    # even: median 2 (3 between), quartiles 1.75 and 5.25; odd: 3, 2 and 4
    wanted = [(s - 2) / 3.5 for s in (1, 2, 4, 9)] + [1.0, -1.0, 0.0]
    assert normalise(scores, space, "robust", "original").tolist() == pytest.approx(wanted)
    plain = [(s - 3) / 3.5 for s in (1, 2, 4, 9)] + [1, -1, 0]
    assert normalise(scores, space, "robust").tolist() == pytest.approx(plain)
    for how in ("minmax", "rank", "none"):
        assert torch.equal(normalise(scores, space, how, "original"), normalise(scores, space, how))


def test_a_quantile_between_scores_whose_difference_is_beyond_float64():
    """A quarter of the way from -1.5e308 to 1.5e308 is -0.75e308; their difference is infinite."""
    ends = [torch.tensor([-1.5e308, 1.5e308], dtype=torch.float64)]
    assert quantile(ends, 0.25) == pytest.approx(-0.75e308, rel=1e-12)
    assert quantile(ends, 0.75) == pytest.approx(0.75e308, rel=1e-12)
