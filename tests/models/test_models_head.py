"""The closed-form head against scikit-learn, plain loops and numbers worked out by hand."""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from torch import nn
from torch.nn import functional as F

from fedsparse.models.convnets import resnet18_gn
from fedsparse.models.head import Statistics, closed_form, features, head_of, temperature
from fedsparse.models.vision import mlp, vit_digits


def samples(n, size, classes, seed, scales=None, offset=0.0):
    g = np.random.default_rng(seed)
    x = (g.standard_normal((n, size)) + offset) * (1.0 if scales is None else scales)
    return torch.tensor(x), torch.tensor(g.integers(0, classes, n))


def sklearn_ridge(x, y, classes, ridge):
    fit = Ridge(alpha=ridge).fit(x.numpy(), np.eye(classes)[y.numpy()])
    return fit.coef_, fit.intercept_


def one_line(error):
    return "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- closed form


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    size=st.integers(1, 8),
    classes=st.integers(2, 5),
    clients=st.integers(1, 6),
    ridge=st.sampled_from([1e-2, 1.0, 50.0]),
    spread=st.sampled_from([0, 2]),
    offset=st.sampled_from([0.0, 5.0]),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_any_split_gives_the_ridge_of_the_pooled_data(seed, n, size, classes, clients, ridge, spread, offset):
    scales = 10.0 ** np.random.default_rng(seed).integers(-spread, spread + 1, size)
    x, y = samples(n, size, classes, seed, scales, offset)
    owner = torch.tensor(np.random.default_rng(seed + 1).integers(0, clients, n))
    parts = [Statistics.of(x[owner == k], y[owner == k], classes) for k in range(clients)]  # some may hold nothing
    weight, bias = reduce(add, parts).solve(ridge)
    coef, intercept = sklearn_ridge(x, y, classes, ridge)
    np.testing.assert_allclose(weight.numpy() * scales, coef * scales, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), intercept, rtol=0, atol=1e-6)
    assert weight.dtype == bias.dtype == torch.float64


def test_size_of_a_vit_in_float32():
    x, y = samples(900, 384, 100, 0)
    x = x.float() * 3 + 1
    weight, bias = closed_form(x, y, 100, 1.0)
    coef, intercept = sklearn_ridge(x.double(), y, 100, 1.0)
    assert weight.shape == (100, 384)
    np.testing.assert_allclose(weight, coef, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias, intercept, rtol=0, atol=1e-6)


def test_without_a_penalty_it_is_least_squares():
    scales = np.array([1e-3, 1.0, 1e3, 1e5])
    x, y = samples(50, 4, 3, 1, scales)
    weight, bias = closed_form(x, y, 3, 0)
    fit = LinearRegression().fit(x.numpy() / scales, np.eye(3)[y.numpy()])  # it drops directions of little spread
    np.testing.assert_allclose(weight.numpy() * scales, fit.coef_, atol=1e-9)
    np.testing.assert_allclose(bias, fit.intercept_, atol=1e-9)


def test_worked_out_by_hand():
    # x = 0, 2 with labels 0, 1: centred x = -1, 1 and y = -1/2, 1/2 for class 1; slope 1 / (2 + ridge)
    weight, bias = closed_form(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), 2, 2.0)
    assert weight.flatten().tolist() == pytest.approx([-0.25, 0.25])
    assert bias.tolist() == pytest.approx([0.75, 0.25])


def test_the_intercept_is_not_penalised():
    x, y = samples(30, 3, 2, 2, offset=4.0)
    weight, bias = closed_form(x, y, 2, 1e12)
    assert weight.abs().max() < 1e-9
    assert bias.tolist() == pytest.approx([(y == c).double().mean().item() for c in range(2)])


def test_statistics_are_plain_sums():
    x, y = samples(7, 3, 4, 3)
    s = Statistics.of(x, y, 4)
    assert s.n == 7
    for i in range(3):
        assert s.x[i].item() == pytest.approx(sum(x[k, i].item() for k in range(7)))
        for c in range(4):
            assert s.xy[i, c].item() == pytest.approx(sum(x[k, i].item() for k in range(7) if y[k] == c))
    assert s.y.tolist() == [sum(1 for k in range(7) if y[k] == c) for c in range(4)]
    triangle = [sum(x[k, i].item() * x[k, j].item() for k in range(7)) for i in range(3) for j in range(i, 3)]
    assert s.xx.tolist() == pytest.approx(triangle)


def test_bytes_by_hand():
    # 1 count, 3 + 2 sums, 6 of the triangle, 3 x 2 of X'y: 18 numbers of 8 bytes
    small = Statistics.of(torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 1]), 2)
    assert sum(tensor.nbytes for tensor in small.tensors) == 144
    # ViT-S on CIFAR-100: 1 + 384 + 100 + 384 x 385 / 2 + 38400 = 112805 numbers
    large = Statistics.of(torch.zeros(1, 384), torch.tensor([0]), 100)
    assert sum(tensor.nbytes for tensor in large.tensors) == 902_440


@pytest.mark.parametrize(
    "x",
    [
        torch.eye(3)[[0, 1, 2, 0]][:, [0, 1, 1]],  # a column twice
        torch.arange(20.0).reshape(2, 10).sqrt(),  # fewer samples than features
        torch.cat([torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.full((40, 1), 0.1)], 1),
        torch.zeros(4, 2),
    ],
)
def test_singular_equations_are_refused(x):
    y = torch.arange(len(x)) % 2
    with pytest.raises(ValueError, match=r"head\.ridge=0 leaves .* singular") as error:
        closed_form(x, y, 2, 0)
    assert one_line(error)
    weight, _ = closed_form(x, y, 2, 1.0)
    np.testing.assert_allclose(weight, sklearn_ridge(x.double(), y, 2, 1.0)[0], atol=1e-6)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite") as error:
        closed_form(torch.tensor([[1.0], [float("inf")]]), torch.tensor([0, 1]), 2, 1.0)
    assert one_line(error)


# --------------------------------------------------------------------------------------------------- head, features


def test_the_head_is_the_one_linear_layer_named():
    net = vit_digits()
    assert head_of(net, "head.*") is net.head
    assert head_of(net, ["norm.*", "head.*"]) is net.head
    for patterns in ("norm.*", "blocks.0.mlp.*", "nothing.*"):
        with pytest.raises(ValueError, match=r"model\.head=.* has to name one linear layer") as error:
            head_of(net, patterns)
        assert one_line(error)


def test_features_are_what_the_head_is_given():
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    flat = mlp(64, 16, 10)
    wanted = torch.relu(x.flatten(1) @ flat.hidden.weight.T + flat.hidden.bias)
    torch.testing.assert_close(features(flat, flat.head, x), wanted.detach())
    for net, head in ((vit_digits(), "head"), (resnet18_gn(10, 1), "fc")):
        found = features(net, getattr(net, head), x)
        net.eval()
        wanted = net.forward_head(net.forward_features(x), pre_logits=True).detach()
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(getattr(net, head)(found), net(x))


def test_features_leave_the_net_as_it_was():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    net[2].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    found = features(net, net[3], x)
    assert not found.requires_grad
    assert torch.equal(found, features(net, net[3], x))  # no dropout
    assert [m.training for m in net] == [True, True, False, True]
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net[3]._forward_pre_hooks


def test_features_refuse_another_shape():
    tokens = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"one vector a sample; it is given \(3, 7, 8\)") as error:
        features(tokens, tokens[1], torch.zeros(3, 7, 4))
    assert one_line(error)
    with pytest.raises(ValueError, match="given nothing"):
        features(tokens, nn.Linear(8, 2), torch.zeros(3, 4))


# ------------------------------------------------------------------------------------------------------ temperature


def test_temperature_by_hand():
    # logits (a, 0), a fraction p of class 0: the best sigmoid(a / T) is p, so T = a / log(p / (1 - p))
    for a, right in ((1.0, 8), (0.1, 6), (30.0, 9)):
        logits = torch.tensor([[a, 0.0]]).expand(10, 2)
        labels = torch.tensor([0] * right + [1] * (10 - right))
        assert temperature(logits, labels) == pytest.approx(a / math.log(right / (10 - right)), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_against_a_fine_grid(seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (200,), generator=g)
    logits = 10.0 ** (seed / 2 - 1) * (F.one_hot(labels, 5) + 0.7 * torch.randn(200, 5, generator=g))
    grid = torch.logspace(-3, 3, 60_001, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits.double() / t, labels) for t in grid[::50]])
    near = int(losses.argmin()) * 50
    window = grid[max(near - 60, 0) : near + 61]
    fine = torch.stack([F.cross_entropy(logits.double() / t, labels) for t in window])
    assert temperature(logits, labels) == pytest.approx(window[fine.argmin()].item(), rel=3e-4)
    assert temperature(logits, labels) == temperature(logits.clone(), labels)


def test_temperature_of_right_and_of_useless_logits():
    sure = torch.eye(3)
    assert temperature(sure, torch.arange(3)) < 0.1
    assert temperature(sure, torch.tensor([1, 2, 0])) > 45
