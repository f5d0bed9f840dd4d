"""Means of low-rank updates, against dense matrices in float64, numbers worked out by hand, and PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedsparse.federation.lowrank import Pair, effective_rank, error, mean, norm, pad, residual, stack, truncate


def drawn(ranks, wide=7, high=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        Pair(
            torch.randn(r, wide, generator=generator, dtype=dtype),
            torch.randn(high, r, generator=generator, dtype=dtype),
        )
        for r in ranks
    ]


def dense(pair):
    return pair.B.double() @ pair.A.double()


def ideal(pairs, weights):
    return sum(w * dense(pair) for w, pair in zip(weights, pairs, strict=True)) / sum(weights)


HAND = [
    Pair(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])),
    Pair(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [2.0]])),
]


def test_two_clients_by_hand():
    half = (0.5, 0.5)
    torch.testing.assert_close(dense(stack(HAND, half)), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(dense(mean(HAND, half)), torch.full((2, 2), 0.5, dtype=torch.float64))
    assert error(HAND, half) == pytest.approx((1.0, 0.70710678))
    same_a = [Pair(HAND[0].A, pair.B) for pair in HAND]  # as in FedSA, where A is the same for all
    assert error(same_a, half) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_is_the_mean_of_products_of_any_ranks(dtype):
    pairs, weights = drawn([1, 4, 2], dtype=dtype), [3, 1, 6]
    found = stack(pairs, weights)
    assert (found.A.shape, found.B.shape) == ((7, 7), (5, 7))
    torch.testing.assert_close(dense(found), ideal(pairs, weights), rtol=0, atol=1e-6)


def test_mean_and_residual_are_the_ideal():
    pairs, weights = drawn([3, 3, 3, 3], seed=2), [1.0, 2.0, 0.5, 4.0]
    together = dense(mean(pairs, weights)) + dense(residual(pairs, weights))
    torch.testing.assert_close(together, ideal(pairs, weights), rtol=0, atol=1e-12)
    gap = ideal(pairs, weights) - dense(mean(pairs, weights))
    wanted = (
        float(torch.linalg.matrix_norm(gap)),
        float(torch.linalg.matrix_norm(gap) / torch.linalg.matrix_norm(ideal(pairs, weights))),
    )
    assert error(pairs, weights) == pytest.approx(wanted)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_the_error_of_clients_that_agree_has_four_digits(spread):
    """By uncentred Gram matrices in float32 it is 6.7 times too large at a spread of 1e-2, 800 times at 1e-3."""
    (middle,), steps = (
        drawn([8], 64, 64, seed=4, dtype=torch.float32),
        drawn([8] * 5, 64, 64, seed=5, dtype=torch.float32),
    )
    pairs = [Pair(middle.A + spread * step.A, middle.B + spread * step.B) for step in steps]
    weights = [1, 2, 3, 4, 5]
    products = ideal(pairs, weights) - sum(w * p.B.double() for w, p in zip(weights, pairs, strict=True)) / 15 @ (
        sum(w * p.A.double() for w, p in zip(weights, pairs, strict=True)) / 15
    )
    assert error(pairs, weights)[0] == pytest.approx(float(torch.linalg.matrix_norm(products)), rel=1e-4)


@pytest.mark.parametrize("r", [1, 3, 6])
def test_truncation_is_that_of_the_dense_product(r):
    stacked = stack(drawn([4, 8, 3], 40, 30, seed=6), [1, 1, 2])
    u, values, v = torch.linalg.svd(dense(stacked))
    found = truncate(stacked, r)
    assert (found.A.shape, found.B.shape) == ((r, 40), (30, r))
    torch.testing.assert_close(dense(found), u[:, :r] * values[:r] @ v[:r], rtol=0, atol=1e-10)
    single = truncate(Pair(stacked.A.float(), stacked.B.float()), r)
    assert single.A.dtype == torch.float32
    torch.testing.assert_close(dense(single), u[:, :r] * values[:r] @ v[:r], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.A.norm(), found.B.norm())  # the scale is shared evenly


def test_a_stack_wider_than_its_layer_is_truncated_too():
    stacked = stack(drawn([6, 6], 5, 4, seed=7), [1, 1])
    torch.testing.assert_close(dense(truncate(stacked, 4)), dense(stacked))


def test_norm_and_effective_rank():
    (pair,) = drawn([3], seed=8)
    assert norm(pair) == pytest.approx(float(torch.linalg.matrix_norm(dense(pair))))
    values = torch.linalg.svdvals(dense(pair))[:3]
    shares = values / values.sum()
    assert effective_rank(pair) == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert effective_rank(Pair(torch.eye(4), torch.eye(4))) == pytest.approx(4)
    assert effective_rank(HAND[0]) == pytest.approx(1)
    zero = Pair(torch.randn(2, 5), torch.zeros(4, 2))
    assert (norm(zero), effective_rank(zero), error([zero, zero], [1, 1])) == (0.0, 0.0, (0.0, 0.0))


def test_padding_keeps_the_product():
    pairs = drawn([1, 3, 4], seed=9)
    for pair, padded in zip(pairs, pad(pairs, 4), strict=True):
        assert (padded.A.shape, padded.B.shape) == ((4, 7), (5, 4))
        assert torch.equal(dense(padded), dense(pair))
    assert float(pad(pairs, 4)[0].A[1:].abs().max()) == 0


def test_a_stack_is_the_concatenation_of_peft():
    peft = pytest.importorskip("peft", reason="peft is in the extra lora")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5))
    options = {"target_modules": ["0"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, **options), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=12, **options))
    layer, weights = model.base_model.model[0], [0.25, 0.75]
    pairs = [
        Pair(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * layer.scaling[name])
        for name in ("one", "two")
    ]
    model.add_weighted_adapter(["one", "two"], weights, "cat", combination_type="cat")
    found = stack(pairs, weights)
    assert len(found.A) == layer.r["cat"] == 5
    torch.testing.assert_close(dense(found).float(), layer.get_delta_weight("cat").detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: stack([], []), "there are no pairs"),
        (lambda: stack(HAND, [1]), r"weights are \[1\]; they must be 2 numbers of 0 or more, not all 0"),
        (lambda: stack(HAND, [0, 0]), "not all 0"),
        (lambda: stack(HAND, [1, -1]), "0 or more"),
        (lambda: stack(HAND, [1, math.nan]), "0 or more"),
        (lambda: mean(drawn([1, 2]), [1, 1]), "factors of ranks 1, 2 have no mean; pad them to one rank"),
        (lambda: stack([*drawn([1]), *drawn([1], wide=3)], [1, 1]), r"a pair has the shapes \(1, 3\) and \(5, 1\)"),
        (lambda: pad(drawn([3]), 2), "a pair of rank 3 cannot be padded to rank 2"),
        (lambda: truncate(HAND[0], 0), "lora.r is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(call, line):
    with pytest.raises(ValueError, match=line):
        call()
