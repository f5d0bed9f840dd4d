"""Planes and directions against plain loops, numpy and scikit-learn; barriers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.landscape import Plane, barrier, between, filter_normalise, random_direction


def relu_net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def models(count, size=50, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=gen(seed), dtype=dtype)


def normalised_by_loops(direction, net, masks=None):
    """Filter by filter, in numpy."""
    out, start = [], 0
    for name, weight in net.named_parameters():
        d = direction[start : start + weight.numel()].view_as(weight).numpy().copy()
        start += weight.numel()
        w, m = weight.detach().numpy(), np.ones(weight.shape) if masks is None else masks[name].numpy()
        for f in range(len(d)):
            inside = m[f] != 0
            if d.ndim == 1 or not inside.any():
                d[f] = 0
                continue
            length = math.sqrt(sum(float(v) ** 2 for v in w[f][inside])) / math.sqrt(sum(d[f][inside] ** 2))
            d[f] = np.where(inside, d[f] * length, 0.0)
        out.append(d.ravel())
    return torch.from_numpy(np.concatenate(out))


@pytest.mark.parametrize("masked", [False, True])
def test_filter_normalise_is_the_loop_over_filters(masked):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()
    space = ParamSpace.of(net)
    mask = torch.rand(space.size, generator=gen(3)) < 0.3 if masked else None
    if masked:
        space.unflatten(mask)["3.weight"][1] = False  # a filter of which nothing moves
    drawn, row = torch.randn(space.size, generator=gen(), dtype=torch.float64), space.read(net)
    found = filter_normalise(drawn, row, space, mask)
    expected = normalised_by_loops(drawn, net, None if mask is None else space.unflatten(mask))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    if masked:
        assert torch.equal(found[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    else:
        lengths = [space.unflatten(v)["3.weight"].norm(dim=1) for v in (found, row)]
        torch.testing.assert_close(*lengths)
    assert not space.unflatten(found)["1.weight"].any()
    assert not space.unflatten(found)["3.bias"].any()


def test_a_filter_of_zeros_does_not_move_and_makes_no_nan():
    space, row = ParamSpace(["w"], [torch.Size([2, 2])]), torch.tensor([0.0, 0.0, 3.0, 4.0])
    found = filter_normalise(torch.tensor([1.0, 1.0, 0.0, 2.0]), row, space)
    assert torch.equal(found, torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert torch.equal(filter_normalise(torch.zeros(4), row, space), torch.zeros(4))


def surface(net, row, first, second, x, y):
    space = ParamSpace.of(net)
    plane, axis = Plane(row, first, second), torch.linspace(-1, 1, 5, dtype=torch.float64)
    rows = plane.point(axis.repeat_interleave(5), axis.repeat(5))
    return torch.stack([cross_entropy(_out(net, space, r, x), y) for r in rows])


@torch.no_grad()
def _out(net, space, row, x):
    return torch.func.functional_call(net, space.unflatten(row), (x,))


def test_the_surface_of_a_rescaled_relu_network_is_the_same_and_a_raw_one_is_not():
    net = relu_net()
    space, x, y = ParamSpace.of(net), models(40, 6, 1), torch.randint(3, (40,), generator=gen(2))
    row = space.read(net)
    scaled = row.clone()
    for name, factor in (("0.weight", 10), ("0.bias", 10), ("2.weight", 0.1)):
        space.unflatten(scaled)[name].mul_(factor)
    drawn = models(2, space.size, 4)
    normal = [[filter_normalise(d, r, space) for d in drawn] for r in (row, scaled)]
    found = [surface(net, r, *directions, x, y) for r, directions in zip((row, scaled), normal, strict=True)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert found[0].max() - found[0].min() > 0.1
    raw = [surface(net, r, *drawn, x, y) for r in (row, scaled)]
    assert (raw[0] - raw[1]).abs().max() > 1


def test_random_directions_are_seeded_and_keep_to_the_mask():
    net = relu_net(dtype=torch.float32)
    space, row = ParamSpace.of(net), ParamSpace.of(net).read(net)
    mask = torch.rand(space.size, generator=gen(5)) < 0.4
    one, again, other = (Plane.random(row, space, gen(seed), mask) for seed in (0, 0, 1))
    assert torch.equal(one.first, again.first)
    assert torch.equal(one.second, again.second)
    assert not torch.equal(one.first, other.first)
    assert torch.equal(one.first, random_direction(row, space, gen(0), mask))
    rows = one.point(torch.tensor([0.0, 1.0, -0.7]), torch.tensor([0.0, 0.3, 1e6]))
    assert rows.dtype == row.dtype
    assert torch.equal(rows[0], row)
    assert torch.equal(rows[:, ~mask], row[~mask].expand(3, -1))
    assert (rows[1:, mask] != row[mask]).any(1).all()


def test_coordinates_invert_points_and_distance_is_what_is_left():
    plane = Plane(*models(3, dtype=torch.float32))  # oblique
    a, b = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.25, 3.0, -1.5, 0.0])
    rows = plane.point(a, b)
    expected = torch.stack([plane.origin + x * plane.first + y * plane.second for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(plane.coordinates(rows), torch.stack([a, b], 1).double(), rtol=0, atol=1e-6)
    assert plane.distance(rows).max() < 1e-5
    off = models(4, seed=9)
    basis = np.stack([plane.first.numpy(), plane.second.numpy()], 1).astype(np.float64)
    for row, at, far in zip(off, plane.coordinates(off), plane.distance(off), strict=True):
        solved, rest, *_ = np.linalg.lstsq(basis, (row - plane.origin.double()).numpy(), rcond=None)
        np.testing.assert_allclose(at.numpy(), solved, atol=1e-10)
        assert float(far) == pytest.approx(math.sqrt(rest[0]), abs=1e-10)


def test_a_plane_through_three_models_holds_them_at_equal_scales():
    rows = models(3)
    plane = Plane.through(rows)
    assert plane.distance(rows).max() < 1e-10
    at = plane.coordinates(rows)
    torch.testing.assert_close(at[:2], torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert abs(float(plane.first @ plane.second)) < 1e-10
    assert float(plane.first.norm()) == pytest.approx(float(plane.second.norm()))
    apart = (at.unsqueeze(0) - at.unsqueeze(1)).norm(dim=2) * plane.first.norm()  # distances on paper
    torch.testing.assert_close(apart, torch.cdist(rows, rows))
    torch.testing.assert_close(plane.point(at[:, 0], at[:, 1]), rows)


def test_a_plane_through_models_inside_a_mask_leaves_the_rest_off_it():
    rows, mask = models(3), torch.arange(50) < 20
    plane = Plane.through(rows, mask)
    assert not plane.first[~mask].any()
    assert not plane.second[~mask].any()
    expected = (rows[:, ~mask] - rows[0, ~mask]).norm(dim=1)
    torch.testing.assert_close(plane.distance(rows), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collinear_models_are_refused(dtype):
    start, way = models(2, dtype=dtype)
    for at in ([0.0, 1.0, 0.37], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]):
        rows = torch.stack([start + t * way for t in at])
        with pytest.raises(ValueError, match="the three models are collinear: they span no plane"):
            Plane.through(rows)
    rows = torch.stack([start + t * way for t in (0, 1, 2, 4)])
    with pytest.raises(ValueError, match="the trajectory is collinear"):
        Plane.pca(rows)
    with pytest.raises(ValueError, match="3 rounds or more, not 2"):
        Plane.pca(rows[:2])
    with pytest.raises(ValueError, match="chunk is 0; it must be a whole number of 1 or more"):
        Plane.pca(rows, chunk=0)
    with pytest.raises(ValueError, match="3 models, not 4"):
        Plane.through(rows)


@pytest.mark.parametrize(("angle", "spanned"), [(1e-4, True), (1e-6, False)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e3])
def test_models_are_collinear_by_their_angle_whatever_their_distance(angle, spanned, scale):
    start, way, across = models(3)
    across -= way * (across @ way) / (way @ way)
    across *= angle * way.norm() / across.norm()
    rows = torch.stack([start, start + scale * way, start + 2 * scale * way + 2 * scale * across])
    trajectory = torch.stack([way, 2 * way + across, 3 * way, 4 * way + across]) * scale
    if spanned:
        assert Plane.through(rows).distance(rows).max() < 1e-6 * scale
        assert Plane.pca(trajectory).distance(trajectory).max() < 1e-6 * scale
    else:
        with pytest.raises(ValueError, match="collinear"):
            Plane.through(rows)
        with pytest.raises(ValueError, match="collinear"):
            Plane.pca(trajectory)


@pytest.mark.parametrize(("angle", "spanned"), [(1.2e-5, True), (0.8e-5, False)])
def test_the_bound_of_an_angle_is_a_hundred_thousandth(angle, spanned):
    rows = torch.zeros(3, 50, dtype=torch.float64)
    rows[1, 0], rows[2, 0], rows[2, 1] = 1, 1, angle
    if spanned:
        assert Plane.through(rows).distance(rows).max() < 1e-12
    else:
        with pytest.raises(ValueError, match="collinear"):
            Plane.through(rows)


def test_a_trajectory_that_stands_still_is_refused():
    with pytest.raises(ValueError, match="the trajectory is collinear"):
        Plane.pca(models(1).expand(4, -1))


def test_pca_of_small_steps_far_from_the_origin_is_scikit_learns_in_float64():
    rows = (1000 + 0.01 * models(8).cumsum(0)).float()
    oracle = PCA(2, svd_solver="full").fit(rows.double().numpy())
    np.testing.assert_allclose(Plane.pca(rows).shares, oracle.explained_variance_ratio_, rtol=1e-9)


def test_pca_of_three_rows_is_their_plane_with_signs_of_its_own():
    rows = models(3)
    for trajectory in (rows, rows.flip(1), 3 - rows):
        plane = Plane.pca(trajectory)
        assert plane.distance(trajectory).max() < 1e-10
        assert sum(plane.shares) == pytest.approx(1)
        centred = trajectory - trajectory.mean(0)
        for direction in (plane.first, plane.second):
            at = centred @ direction
            assert float(at[at.abs().argmax()]) > 0


def test_a_mask_without_weights_spans_no_plane():
    net = relu_net()
    space = ParamSpace.of(net)
    with pytest.raises(ValueError, match="random directions span no plane"):
        Plane.random(space.read(net), space, gen(), space.where("*.bias"))


def test_pca_by_the_gram_matrix_is_scikit_learns():
    steps = models(8) * torch.linspace(3, 0.1, 50, dtype=torch.float64)
    rows = steps.cumsum(0)
    plane, oracle = Plane.pca(rows, chunk=17), PCA(2, svd_solver="full").fit(rows.numpy())
    assert torch.equal(plane.origin, rows[-1])
    np.testing.assert_allclose(plane.shares, oracle.explained_variance_ratio_, rtol=1e-10)
    for found, expected in zip((plane.first, plane.second), oracle.components_, strict=True):
        assert float(found.norm()) == pytest.approx(1)
        assert abs(found.numpy() @ expected) == pytest.approx(1)
    projected = oracle.transform(rows.numpy())
    differences = np.abs(projected - projected[-1])  # signs are free
    np.testing.assert_allclose(plane.coordinates(rows).abs().numpy(), differences, atol=1e-9)
    assert plane.distance(rows)[:-1].min() > 0.1


def test_points_between_two_models_hit_both_to_the_bit():
    start, end = models(2, dtype=torch.float32)
    rows = between(start, end, torch.tensor([0.0, 0.25, 1.0, 1.5]))
    assert torch.equal(rows[0], start)
    assert torch.equal(rows[2], end)
    torch.testing.assert_close(rows[1], 0.75 * start + 0.25 * end)
    torch.testing.assert_close(rows[3], 1.5 * end - 0.5 * start)


def test_the_three_figures_of_a_barrier():
    assert barrier(torch.tensor([1.0, 3.0, 2.0, 5.0, 2.0])) == pytest.approx((3.25, 3.0, 5.0))
    uneven = barrier(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.5, 1.0]) ** 2)
    assert uneven == pytest.approx((0.0, 0.0, 4.0))
    accuracy = barrier(torch.tensor([0.8, 0.1, 0.6]), higher_is_better=True)
    assert accuracy == pytest.approx((0.6, 0.5, 0.1))


def test_values_on_their_chord_have_no_barrier_but_rounding():
    assert barrier(torch.linspace(0, 3, 4, dtype=torch.float64)).above_chord == pytest.approx(0, abs=1e-15)


def test_a_barrier_of_nothing_above_the_chord_still_names_a_client_at_loss_55():
    losses = barrier(torch.tensor([0.8, 12.0, 30.0, 55.0]))
    assert losses == pytest.approx((0.0, 0.0, 55.0))
    accuracy = barrier(torch.tensor([0.76, 0.3, 0.1]), higher_is_better=True)
    assert accuracy == pytest.approx((0.13, 0.0, 0.1))


def test_gaps_on_a_line_are_left_out_and_gaps_at_its_ends_leave_no_chord():
    nan = float("nan")
    assert barrier(torch.tensor([1.0, nan, 3.0, 1.0])) == pytest.approx((2.0, 2.0, 3.0))
    found = barrier(torch.tensor([1.0, 2.0, nan]))
    assert math.isnan(found.above_chord)
    assert math.isnan(found.above_worse_end)
    assert found.worst == 2.0
    assert all(math.isnan(v) for v in barrier(torch.tensor([nan, nan])))
    with pytest.raises(ValueError, match="2 points or more"):
        barrier(torch.tensor([1.0]))
