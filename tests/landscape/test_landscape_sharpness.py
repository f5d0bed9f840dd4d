"""Sharpness and PAC-Bayes on quadratics that are solved by hand; the path norm against sums over paths; splines."""

from __future__ import annotations

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Split
from fedsparse.landscape import (
    MeanLoss,
    Rise,
    Task,
    filter_normalise,
    mean_rise,
    pac_bayes,
    path_norm,
    refine,
    sam,
    sigma,
)
from fedsparse.models.convnets import fednet, resnet18_gn
from fedsparse.models.vision import mlp, vit_digits

DIAGONAL = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


class Quadratic:
    """0.5 w'Dw."""

    def __call__(self, row):
        return float(0.5 * (DIAGONAL * row**2).sum())

    def gradient(self, row):
        return DIAGONAL * row


def rise_of_quadratic(perturbation):
    return float(0.5 * (DIAGONAL * perturbation.double() ** 2).sum())


def test_sam_on_a_quadratic_is_its_slope_and_its_curvature():
    row = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    g = torch.tensor([4.0, -6.0, 3.0], dtype=torch.float64)
    found = sam(Quadratic(), row, 0.1)
    assert found.first_order == pytest.approx(0.1 * math.sqrt(61))
    assert found.curvature == pytest.approx(0.5 * 0.01 * float((DIAGONAL * g**2).sum()) / 61)
    assert found.rise == pytest.approx(found.first_order + found.curvature)
    assert sam(Quadratic(), torch.zeros(3, dtype=torch.float64)) == Rise(0.0, 0.0)


def test_defaults_are_those_that_are_documented():
    row = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert sam(Quadratic(), row) == sam(Quadratic(), row, 0.05, adaptive=False)
    net, space, split = relu_task()
    task, row = Task(net, space, losses), space.read(net)
    assert mean_rise(task, row, split, gen()) == mean_rise(task, row, split, gen(), radius=0.1, draws=20)


def test_adaptive_sam_scales_by_the_weights():
    row = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    scaled = torch.tensor([4.0, 12.0, 9.0])  # |w| g
    found = sam(Quadratic(), row, 0.1, adaptive=True)
    length = float(scaled.norm())
    assert found.first_order == pytest.approx(0.1 * length)
    step = 0.1 * torch.tensor([1 * 4.0, 4 * -6.0, 9 * 3.0], dtype=torch.float64) / length
    assert found.rise == pytest.approx(Quadratic()(row + step) - Quadratic()(row))
    with pytest.raises(ValueError, match="sharpness.rho is 0; it must be a finite number above 0"):
        sam(Quadratic(), row, 0)


def relu_task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    split = Split(torch.randn(40, 6, generator=gen(1), dtype=torch.float64), torch.randint(3, (40,), generator=gen(2)))
    return net, ParamSpace.of(net), split


def test_rescaling_a_relu_network_changes_sam_and_not_its_adaptive_form():
    net, space, split = relu_task()
    loss, row = MeanLoss(Task(net, space, losses), split), space.read(net)
    scaled = row.clone()
    for name, factor in (("0.weight", 10), ("0.bias", 10), ("2.weight", 0.1)):
        space.unflatten(scaled)[name].mul_(factor)
    assert sam(loss, scaled, adaptive=True) == pytest.approx(sam(loss, row, adaptive=True), rel=1e-9)
    assert sam(loss, scaled).rise > 2 * sam(loss, row).rise


def test_sam_keeps_to_the_mask():
    net, space, split = relu_task()
    row, mask = space.read(net), space.where("2.*")
    loss = MeanLoss(Task(net, space, losses), split, mask)
    whole = copy.deepcopy(net)
    cross_entropy(whole(split.x), split.y).backward()
    g = torch.cat([p.grad.flatten() for p in whole.parameters()]) * mask
    found = sam(loss, row, 0.3)
    assert found.first_order == pytest.approx(0.3 * float(g.norm()))
    assert found.rise == pytest.approx(loss(row + 0.3 * g / g.norm()) - loss(row))


def test_the_mean_rise_is_a_loop_over_directions_both_ways():
    net, space, split = relu_task()
    together = []

    def noted(forward, x, y):
        together.append(len(y) // 40)
        return losses(forward, x, y)

    task, row, mask = Task(net, space, noted, per_sample=True), space.read(net), space.where("0.*")
    found = mean_rise(task, row, split, gen(7), radius=0.2, draws=6, mask=mask, points=5)
    assert max(together) == 5  # of 12 points: the first chunk is tried stacked too
    loss, g, rises = MeanLoss(task, split), gen(7), []
    for _ in range(6):
        d = filter_normalise(torch.randn(space.size, generator=g, dtype=torch.float64), row, space, mask)
        rises.append((loss(row + 0.2 * d) + loss(row - 0.2 * d)) / 2 - loss(row))
    assert found == pytest.approx((np.mean(rises), np.std(rises, ddof=1) / math.sqrt(6)), rel=1e-9)
    rise, error = mean_rise(task, row, split, gen(7), radius=0.2, draws=2, mask=mask)
    assert (rise, error) == pytest.approx((np.mean(rises[:2]), np.std(rises[:2], ddof=1) / math.sqrt(2)), rel=1e-9)
    diverged = mean_rise(task, row * math.inf, split, gen(7))
    assert all(math.isnan(value) for value in diverged)
    with pytest.raises(ValueError, match="sharpness.draws is 1"):
        mean_rise(task, row, split, gen(), draws=1)
    with pytest.raises(ValueError, match="sharpness.radius is 0"):
        mean_rise(task, row, split, gen(), radius=0)


def test_sigma_of_a_quadratic_is_the_root_of_twice_the_rise_over_the_trace():
    exact = math.sqrt(2 * 0.1 / 8)
    assert exact == pytest.approx(0.158114, abs=1e-6)
    found = sigma(rise_of_quadratic, 3, draws=3000, generator=gen())
    assert found == pytest.approx(exact, rel=0.02)
    assert abs(found - 0.397635) > 0.2  # sigma squared as the standard deviation


@pytest.mark.parametrize("target", [0.01, 0.1, 0.3])
def test_sigma_is_the_root_of_the_mean_over_its_own_draws(target):
    g, size = gen(3), 3
    mean = np.mean([rise_of_quadratic(torch.randn(size, generator=g)) for _ in range(30)])
    seen = []

    def rise(perturbation):
        seen.append(perturbation)
        return rise_of_quadratic(perturbation)

    found = sigma(rise, size, target, generator=gen(3))
    assert found == pytest.approx(math.sqrt(target / mean), rel=1e-5)
    assert len(seen) == 30 * 22  # two ends, twenty steps
    torch.testing.assert_close(seen[30] / 0.5, seen[0] / 1e-3)
    assert seen[0].shape == (3,)


def test_sigma_where_the_rise_is_the_target_is_not_above_it():
    assert sigma(lambda p: 0.25, 3, 0.25, draws=2, generator=gen()) == 0.5
    once = sigma(rise_of_quadratic, 3, low=0.1, high=0.3, steps=1, generator=gen())
    assert once in (pytest.approx(0.15), pytest.approx(0.25))


def test_sigma_at_the_ends_of_its_range():
    assert sigma(lambda p: 1e6, 3, generator=gen()) == 1e-3
    assert sigma(lambda p: 0.0, 3, generator=gen()) == 0.5
    assert sigma(lambda p: math.nan, 3, generator=gen()) == 1e-3
    wall = sigma(lambda p: math.inf if float(p.norm()) > 0.3 else 0.0, 1, draws=1, generator=gen())
    assert wall * abs(float(torch.randn(1, generator=gen()))) == pytest.approx(0.3, rel=1e-4) or wall == 0.5
    for options, line in (
        ({"target": 0}, "sigma.target is 0"),
        ({"draws": 0}, "sigma.draws is 0"),
        ({"low": 0.0}, "sigma.low is 0.0"),
        ({"high": 1e-3}, "sigma.high is 0.001"),
        ({"steps": 0}, "sigma.steps is 0"),
    ):
        with pytest.raises(ValueError, match=line):
            sigma(lambda p: 0.0, 3, generator=gen(), **options)


def test_the_pac_bayes_bound_by_hand():
    # 9 / (2 * 0.25) = 18; ln(2 * 10 * 7 / 0.05) = 7.937375; their sum over 200
    assert pac_bayes(0.2, 9.0, 0.5, 100, 7) == pytest.approx(0.2 + math.sqrt((18 + math.log(2800)) / 200))
    assert pac_bayes(0.2, 9.0, 0.5, 100, 7) == pytest.approx(0.2 + 0.360121, abs=1e-6)
    assert pac_bayes(0.2, 9.0, 0.5, 100, 7, 0.5) == pytest.approx(0.2 + math.sqrt((18 + math.log(280)) / 200))
    assert pac_bayes(0.0, 0.0, 0.5, 1, 1, 0.5) == pytest.approx(math.sqrt(math.log(4) / 2))  # the least of each
    assert pac_bayes(1.0, 0.5, 0.5, 1, 1, 0.5) == pytest.approx(1 + math.sqrt((1 + math.log(4)) / 2))
    for wrong in ((1.1, 9, 0.5, 100, 7), (0.2, -1, 0.5, 100, 7), (0.2, 9, 0, 100, 7), (0.2, 9, 0.5, 0, 7)):
        with pytest.raises(ValueError, match="it must be"):
            pac_bayes(*wrong)
    with pytest.raises(ValueError, match="grid is 0"):
        pac_bayes(0.2, 9, 0.5, 100, 0)
    with pytest.raises(ValueError, match="delta is 1"):
        pac_bayes(0.2, 9, 0.5, 100, 7, 1)


def issues_example():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    given = [[[1.0, -2.0], [3.0, 0.0]], [0.5, -1.0], [[2.0, -1.0]], [0.1]]
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), given, strict=True):
            parameter.copy_(torch.tensor(value))
    return net


def test_the_path_norm_by_hand_and_over_all_paths():
    net = issues_example().train()
    before = copy.deepcopy(net.state_dict())
    assert path_norm(net, (2,)) == pytest.approx(5.5686623, abs=1e-6)
    assert path_norm(net, (2,)) ** 2 == pytest.approx(31.01, rel=1e-6)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in net.parameters())
    total = sum((w2[0, h] * w1[h, i]) ** 2 for h, i in product(range(2), range(2)))
    total += sum((w2[0, h] * b1[h]) ** 2 for h in range(2)) + b2[0] ** 2
    assert path_norm(net, (2,)) == pytest.approx(math.sqrt(total))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_all_weights_times_c_give_c_to_the_number_of_layers():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    once = path_norm(net, (1, 8, 8))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.7)
    assert path_norm(net, (1, 8, 8)) == pytest.approx(1.7**3 * once, rel=1e-6)


def stirred(net, seed=0):
    """BatchNorm with statistics and weights that matter."""
    g = gen(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_mean, -1), (module.running_var, 0.5)):
                tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=g))
            for tensor in (module.weight, module.bias) if module.affine else ():
                tensor.data.copy_(torch.randn(tensor.shape, generator=g))
    return net


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_is_folded_first(bias, affine):
    torch.manual_seed(1)
    first = nn.Sequential(nn.Conv2d(1, 3, 3, bias=bias), nn.BatchNorm2d(3, affine=affine), nn.ReLU(), nn.Flatten())
    net = stirred(nn.Sequential(*first, nn.Linear(27, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))).double()
    net.eval()
    conv, head = nn.Conv2d(1, 3, 3).double(), nn.Linear(27, 5).double()
    with torch.no_grad():
        for plain, layer, norm in ((conv, net[0], net[1]), (head, net[4], net[5])):
            zero, one = torch.zeros(len(norm.running_mean)), torch.ones(len(norm.running_mean))
            scale = (one if norm.weight is None else norm.weight) / torch.sqrt(norm.running_var + norm.eps)
            own = zero if layer.bias is None else layer.bias
            plain.weight.copy_(layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1)))
            plain.bias.copy_((own - norm.running_mean) * scale + (zero if norm.bias is None else norm.bias))
    folded = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head, nn.ReLU(), net[7])
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), net(x))
    assert path_norm(net, (1, 5, 5)) == pytest.approx(path_norm(folded, (1, 5, 5)), rel=1e-12)


def test_batchnorm_after_a_write_in_place_or_before_a_layer_is_a_map_by_itself():
    torch.manual_seed(1)
    layers = [nn.BatchNorm1d(3), nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 2)]
    net = stirred(nn.Sequential(*layers)).double().eval()
    total = torch.ones(1, 3, dtype=torch.float64)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                total = total @ layer.weight.T**2 + layer.bias**2
            elif isinstance(layer, nn.BatchNorm1d):
                scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
                total = total * scale**2 + (layer.bias - layer.running_mean * scale) ** 2
    assert path_norm(net, (3,)) == pytest.approx(math.sqrt(float(total.sum())), rel=1e-12)


class ReadTwice(nn.Module):
    """What BatchNorm takes is added to its result as well."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.linear(x)
        return x + self.norm(x)


def test_what_has_no_path_norm_is_refused_by_name():
    for net, shape, line in (
        (vit_digits(10), (1, 8, 8), r"blocks\.0\.norm1 is LayerNorm, for which there is no path norm"),
        (resnet18_gn(10, 1), (1, 8, 8), r"is GroupNorm\w*, for which there is no path norm"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), (4,), "0 is MultiheadAttention, for which"),
        (nn.Sequential(nn.LSTM(4, 2)), (4,), "0 is LSTM, for which"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), (4,), "1 is PReLU, for which"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), (4,), "1 has no running"),
        (stirred(ReadTwice()), (3,), "BatchNorm cannot be folded"),
    ):
        with pytest.raises(ValueError, match=line):
            path_norm(net, shape)


def test_a_square_that_is_negative_or_not_finite_is_refused():
    class Minus(nn.Module):
        def forward(self, x):
            return -x

    with pytest.raises(ValueError, match="the path norm's square is -.*the activations are no ReLU"):
        path_norm(nn.Sequential(nn.Linear(3, 2), Minus()), (3,))
    net = nn.Sequential(nn.Linear(3, 2)).double()
    net[0].weight.data[0, 0] = 1e200  # the output is finite, its square is not
    with pytest.raises(ValueError, match="the path norm's square is inf.*the model diverged"):
        path_norm(net, (3,))
    net[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the path norm's square is nan|cannot be folded"):
        path_norm(net, (3,))


def test_a_network_of_zeros_has_the_path_norm_0():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert path_norm(net, (3,)) == 0


def test_the_models_of_fedland_have_a_path_norm():
    assert path_norm(mlp(64, 64, 10), (1, 8, 8)) > 0
    net = fednet(10, 1, img_size=8)
    dropped = path_norm(net.train(), (1, 8, 8))
    assert dropped == path_norm(net.eval(), (1, 8, 8)) > 0  # dropout draws nothing


def waves(frequency):
    def evaluate(a, b):
        assert a.shape == b.shape
        calls.append(len(a))
        return np.stack([np.sin(frequency * a) * np.cos(b) + a**2, np.full(len(a), 0.5)], 1)

    calls = []
    return evaluate, calls


def test_a_smooth_surface_is_refined_from_few_points_with_an_error_that_holds():
    evaluate, calls = waves(2.0)
    found = refine(evaluate, grid=51, generator=np.random.default_rng(0))
    assert found.coarse == 11
    assert calls == [40, 121]
    assert found.evaluated == 161
    a, b = np.meshgrid(found.axis, found.axis, indexing="ij")
    exact = evaluate(a.ravel(), b.ravel()).reshape(51, 51, 2)
    errors = np.abs(found.values - exact).max((0, 1)) / np.ptp(exact[..., 0])
    assert found.errors[0] < 0.01
    assert errors[0] < 3 * found.errors[0]
    assert found.errors[0] > 1e-7
    assert found.errors[1] < 1e-12  # a constant has no range


def test_a_rough_surface_is_evaluated_more_finely_until_it_holds_or_whole():
    evaluate, calls = waves(20.0)
    found = refine(evaluate, grid=51, generator=np.random.default_rng(0))
    assert (found.coarse, calls) == (41, [40, 121, 320, 1240])
    assert found.evaluated == 40 + 41**2
    assert 0 < found.errors[0] <= 0.01
    evaluate, calls = waves(200.0)
    found = refine(evaluate, grid=31, generator=np.random.default_rng(0))
    assert (found.coarse, calls) == (31, [40, 121, 320, 961])
    assert found.evaluated == 40 + 441 + 961
    assert found.errors.tolist() == [0.0, 0.0]
    a, b = np.meshgrid(found.axis, found.axis, indexing="ij")
    assert np.array_equal(found.values, evaluate(a.ravel(), b.ravel()).reshape(31, 31, 2))


def test_no_spline_goes_through_a_gap_and_a_small_grid_needs_none():
    def holed(a, b):
        return np.where(a > 0.6, np.nan, a)[:, None]

    found = refine(holed, grid=21, generator=np.random.default_rng(0))
    assert found.coarse == 21
    assert np.array_equal(np.isnan(found.values[..., 0]), np.broadcast_to((found.axis > 0.6)[:, None], (21, 21)))
    evaluate, calls = waves(2.0)
    found = refine(evaluate, reach=(-2, 3), grid=7, generator=np.random.default_rng(0))
    assert calls == [49]
    assert found.evaluated == 49
    assert found.axis.tolist() == pytest.approx(np.linspace(-2, 3, 7).tolist())
    for options, line in (
        ({"grid": 2}, "grid is 2; it must be a whole number of 3 or more"),
        ({"coarse": 3}, "coarse is 3; it must be a whole number of 4 or more"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"held_out": 0}, "held_out is 0"),
    ):
        with pytest.raises(ValueError, match=line):
            refine(evaluate, generator=np.random.default_rng(0), **options)


def test_a_surface_is_refined_by_default_to_a_hundredth_on_51_points_from_minus_1_to_1():
    evaluate, calls = waves(7.5)  # on 11 x 11 points the error is 1.7 %
    found = refine(evaluate, generator=np.random.default_rng(0))
    assert calls == [40, 121, 320]
    assert found.errors[0] < 0.01
    np.testing.assert_allclose(found.axis, np.linspace(-1, 1, 51))
    coarser = refine(evaluate, generator=np.random.default_rng(0), tolerance=0.02)
    assert coarser.coarse == 11
    assert 0.01 < coarser.errors[0] <= 0.02
    same = refine(evaluate, generator=np.random.default_rng(0), tolerance=float(coarser.errors[0]))
    assert same.coarse == 11  # an error that equals the tolerance holds


@pytest.mark.parametrize("unit", [0.01, 100.0])
def test_an_error_is_a_part_of_the_range_whatever_the_unit(unit):
    evaluate, _ = waves(7.5)
    options = {"coarse": 11, "tolerance": 0.02}
    plain = refine(evaluate, generator=np.random.default_rng(0), **options)
    other = refine(lambda a, b: unit * evaluate(a, b), generator=np.random.default_rng(0), **options)
    np.testing.assert_allclose(other.errors[0], plain.errors[0], rtol=1e-9)
    np.testing.assert_allclose(other.values, unit * plain.values, rtol=1e-9, atol=1e-12 * unit)


def test_a_fine_grid_that_is_the_coarse_one_needs_no_spline_and_one_held_out_point_is_enough():
    evaluate, calls = waves(2.0)
    assert refine(evaluate, grid=11, generator=np.random.default_rng(0)).evaluated == 121
    assert calls == [121]
    found = refine(evaluate, grid=21, held_out=1, tolerance=0.1, generator=np.random.default_rng(0))
    assert calls == [121, 1, 121]
    assert found.evaluated == 122


@pytest.mark.parametrize("where", ["grid", "held_out"])
def test_a_gap_in_the_grid_alone_or_between_its_points_alone_is_not_bridged(where):
    seen = []

    def holed(a, b):
        gap = (np.abs(a) == 1) if where == "grid" else (np.abs(a - 0.05) < 0.04)
        seen.append(gap.any())
        return np.where(gap, np.nan, a + b)[:, None]

    found = refine(holed, grid=51, generator=np.random.default_rng(0))
    assert seen == ([False, True, True] if where == "grid" else [True, False, True])
    assert found.coarse == 51
    expected = (np.abs(found.axis) == 1) if where == "grid" else (np.abs(found.axis - 0.05) < 0.04)
    assert np.array_equal(np.isnan(found.values[..., 0]), np.broadcast_to(expected[:, None], (51, 51)))
