"""SparseSGDM against torch's SGD where everything trains, and against a plain loop where a mask freezes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from torch import nn

from fedsparse.core.subspace import CHUNK
from fedsparse.optim.adam import SparseAdam
from fedsparse.optim.fedopt import FedAdagrad, FedAdam, FedYogi
from fedsparse.optim.index import TrainedIndex
from fedsparse.optim.sgdm import SparseSGDM, sgdm_update

OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov}
    for momentum in (0.0, 0.9)
    for dampening in (0.0, 0.3)
    for decay in (0.0, 0.01)
    for nesterov in (False, True)
    if not nesterov or (momentum > 0 and dampening == 0)
]
SHAPES = [(), (7,), (3, 5), (2, 3, 3, 3), (1, 1000), (0,)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randoms(shapes, dtype=torch.float32, seed=0):
    source = generator(seed)
    return [torch.randn(shape, generator=source, dtype=dtype) for shape in shapes]


def bits(tensor):
    return tensor.detach().contiguous().numpy().tobytes()


def walk(optimizer, params, steps, seed=1):
    """Step with the same gradients for the same seed."""
    for step in range(steps):
        grads = randoms([p.shape for p in params], params[0].dtype, seed * 1000 + step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def plain_loop(start, grads, masks, lr, momentum, dampening, weight_decay, nesterov):
    """One coordinate after the other in Python floats; None keeps the mask of the step before.

    Dampening is a part of momentum: without momentum, torch ignores it.
    """
    theta, velocity, mask, first = [float(v) for v in start], [0.0] * len(start), None, True
    for grad, new in zip(grads, masks, strict=True):
        mask = mask if new is None else new
        for i in range(len(theta)):
            if not mask[i]:
                velocity[i] = 0.0
                continue
            d = float(grad[i]) + weight_decay * theta[i]
            velocity[i] = d if first or momentum == 0 else momentum * velocity[i] + (1 - dampening) * d
            d = d + momentum * velocity[i] if nesterov else velocity[i]
            theta[i] -= lr * d
        first = False
    return theta


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_mask_equals_torch_bit_for_bit(options, dtype):
    ours, theirs = randoms(SHAPES, dtype), randoms(SHAPES, dtype)
    walk(SparseSGDM(ours, lr=0.05, **options), ours, 100)
    walk(torch.optim.SGD(theirs, lr=0.05, foreach=False, **options), theirs, 100)
    assert [bits(a) for a in ours] == [bits(b) for b in theirs]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [1.0, 0.5])
def test_a_large_parameter_in_one_sweep_equals_torch_bit_for_bit(options, dtype, trained, monkeypatch):
    """Also where the kernel's last coordinates do not fill a register, and after the momentum was reset.

    Half of the largest are more than a chunk.
    """
    swept, real = [], torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda p, *a, **k: (swept.append(p[0].numel()), real(p, *a, **k))[1])
    shapes = [(160, 128), (300_031,), (63,)]
    ours, theirs, start = (randoms(shapes, dtype) for _ in range(3))
    masks = [torch.rand(shape, generator=generator(9)) < trained for shape in shapes]
    sparse = SparseSGDM(ours, lr=0.05, masks=masks, **options)
    for _ in range(2):
        sparse.reset()
        walk(sparse, ours, 3)
        walk(torch.optim.SGD(theirs, lr=0.05, foreach=False, **options), theirs, 3)
    for own, other, first, mask in zip(ours, theirs, start, masks, strict=True):
        assert bits(own[mask]) == bits(other[mask])
        assert bits(own[~mask]) == bits(first[~mask])
    assert ({20_480, 299_968} if trained == 1 else {CHUNK}) <= set(swept)
    assert min(swept) >= 64


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_where_a_mask_trains_it_equals_torch_and_elsewhere_nothing_changes(options):
    start = randoms([(1, 1000)])[0]
    mask = torch.rand((1, 1000), generator=generator(5)) < 0.2
    ours, theirs = start.clone(), start.clone()
    walk(SparseSGDM([ours], lr=0.05, masks=[mask], **options), [ours], 20)
    walk(torch.optim.SGD([theirs], lr=0.05, foreach=False, **options), [theirs], 20)
    assert bits(ours[mask]) == bits(theirs[mask])
    assert bits(ours[~mask]) == bits(start[~mask])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_changing_masks_equal_a_plain_loop(options):
    rng = np.random.default_rng([3])
    start, grads = rng.normal(size=12), rng.normal(size=(12, 12))
    masks = [rng.random(12) < 0.5 if step % 3 == 0 else None for step in range(12)]
    param = torch.tensor(start)
    optimizer = SparseSGDM([param], lr=0.1, **options)
    for grad, mask in zip(grads, masks, strict=True):
        if mask is not None:
            optimizer.set_masks([torch.tensor(mask)])
        param.grad = torch.tensor(grad)
        optimizer.step()
    np.testing.assert_allclose(param.numpy(), plain_loop(start, grads, masks, 0.1, **options), rtol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(array_shapes(min_dims=0, max_dims=4, max_side=5), st.sampled_from(OPTIONS), st.integers(0, 99))
def test_any_shape_equals_a_plain_loop(shape, options, seed):
    rng = np.random.default_rng([seed])
    start, grads, mask = rng.normal(size=shape), rng.normal(size=(3, *shape)), rng.random(shape) < 0.5
    param = torch.tensor(start)
    optimizer = SparseSGDM([param], lr=0.1, masks=[torch.tensor(mask)], **options)
    for grad in grads:
        param.grad = torch.tensor(grad)
        optimizer.step()
    expected = plain_loop(start.ravel(), grads.reshape(3, -1), [mask.ravel(), None, None], 0.1, **options)
    np.testing.assert_allclose(param.numpy().ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_frozen_coordinates_keep_every_bit(options, dtype):
    odd = [-0.0, 0.0, 1.5, math.inf, -math.inf, math.nan, 1e-30, -0.0]
    param = torch.tensor([*odd, 1.0], dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
    before = param.clone().view(integer)
    mask = torch.tensor([False] * len(odd) + [True])
    optimizer = SparseSGDM([param], lr=0.1, masks=[mask], **options)
    for value in (math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0):
        param.grad = torch.tensor([value] * len(odd) + [1.0], dtype=dtype)
        optimizer.step()
    assert torch.equal(param.view(integer)[:-1], before[:-1])
    assert param[-1] != 1
    assert torch.isfinite(param[-1])


@pytest.mark.parametrize("lr", [0, 0.0])
def test_a_schedule_that_ends_at_zero_keeps_minus_zero(lr):
    param = torch.tensor([-0.0, 1.0])
    optimizer = SparseSGDM([param], lr=0.1, masks=[torch.tensor([False, True])])
    optimizer.param_groups[0]["lr"] = lr
    param.grad = torch.ones(2)
    optimizer.step()
    assert bits(param) == bits(torch.tensor([-0.0, 1.0]))


def test_a_coordinate_frozen_between_steps_starts_again_without_momentum():
    param = torch.zeros(2, dtype=torch.float64)
    optimizer = SparseSGDM([param], lr=1.0, momentum=0.5)
    param.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    optimizer.set_masks([torch.tensor([True, False])])
    optimizer.set_masks([None])
    optimizer.step()
    assert param.tolist() == [-1.0 - 1.5, -1.0 - 1.0]


def test_nan_momentum_goes_with_the_mask():
    param = torch.zeros(2)
    optimizer = SparseSGDM([param], lr=1.0)
    param.grad = torch.tensor([1.0, math.nan])
    optimizer.step()
    optimizer.set_masks([torch.tensor([True, False])])
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_reset_is_a_fresh_optimizer_in_the_same_memory(options):
    mask = torch.rand((3, 5), generator=generator(2)) < 0.5
    used, fresh = randoms([(3, 5)])[0], randoms([(3, 5)])[0]
    optimizer = SparseSGDM([used], lr=0.1, masks=[mask], **options)
    walk(optimizer, [used], 4)
    memory = [s["momentum_buffer"].data_ptr() for s in optimizer.state.values()]
    used.copy_(fresh)
    optimizer.reset()
    walk(optimizer, [used], 5, seed=2)
    walk(SparseSGDM([fresh], lr=0.1, masks=[mask], **options), [fresh], 5, seed=2)
    assert bits(used) == bits(fresh)
    assert memory == [s["momentum_buffer"].data_ptr() for s in optimizer.state.values()]


@pytest.mark.parametrize("after_reset", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_a_loaded_state_continues_bit_equal(options, after_reset, tmp_path):
    mask = torch.rand((3, 5), generator=generator(2)) < 0.5
    ours = randoms([(3, 5), (4,)])
    first = SparseSGDM(ours, lr=0.1, masks=[mask, None], **options)
    walk(first, ours, 3)
    if after_reset:
        first.reset()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    copied = [p.detach().clone() for p in ours]
    second = SparseSGDM(copied, lr=0.7, masks=[mask, None])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    walk(first, ours, 3, seed=4)
    walk(second, copied, 3, seed=4)
    assert [bits(a) for a in ours] == [bits(b) for b in copied]


def test_a_dense_state_under_a_mask_moves_nothing_frozen():
    param = torch.ones(2)
    dense = SparseSGDM([param], lr=0.1)
    walk(dense, [param], 3)
    other = torch.tensor([-0.0, 1.0])
    masked = SparseSGDM([other], lr=0.1, masks=[torch.tensor([False, True])])
    masked.load_state_dict(dense.state_dict())
    walk(masked, [other], 1)
    assert bits(other[:1]) == bits(torch.tensor([-0.0]))


def test_it_goes_on_from_the_state_of_torch_sgd():
    theirs, ours = torch.ones(4), torch.ones(4)
    sgd, optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, foreach=False), SparseSGDM([ours], lr=0.1)
    walk(sgd, [theirs], 3)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))  # torch shares the tensors of a loaded state
    ours.copy_(theirs)
    walk(sgd, [theirs], 3, seed=2)
    walk(optimizer, [ours], 3, seed=2)
    assert bits(ours) == bits(theirs)


def test_gradients_stay_and_a_parameter_without_one_is_skipped():
    params = randoms([(3,), (3,)])
    grad, still = torch.tensor([1.0, math.nan, 2.0]), params[1].clone()
    params[0].grad = grad.clone()
    options = {"weight_decay": 0.1, "nesterov": True}
    SparseSGDM(params, lr=0.1, masks=[torch.tensor([True, False, True]), None], **options).step()
    assert bits(params[0].grad) == bits(grad)
    assert bits(params[1]) == bits(still)


def test_a_module_with_closure_groups_and_schedule_equals_torch():
    def train(make):
        torch_generator = generator(1)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=torch_generator))
        x, y = torch.randn(16, 4, generator=torch_generator), torch.arange(16) % 2
        optimizer = make([{"params": net[0].parameters(), "lr": 0.2}], lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": net[2].parameters(), "weight_decay": 0.1})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        losses = []
        for _ in range(10):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        return losses, [bits(p) for p in net.parameters()]

    ours, theirs = train(SparseSGDM), train(lambda *a, **k: torch.optim.SGD(*a, foreach=False, **k))
    assert ours == theirs
    assert ours[0][-1] < ours[0][0]


def test_masks_stand_beside_the_parameters_of_all_groups():
    a, b, c = (torch.zeros(2) for _ in range(3))
    only_first, only_second = torch.tensor([True, False]), torch.tensor([False, True])
    optimizer = SparseSGDM([{"params": [a, b]}], lr=1.0, masks=[only_first, only_second])
    optimizer.add_param_group({"params": [c]})
    for p in (a, b, c):
        p.grad = torch.ones(2)
    optimizer.step()
    assert [p.tolist() for p in (a, b, c)] == [[-1, 0], [0, -1], [-1, -1]]
    optimizer.reset()
    optimizer.set_masks([None, None, only_first])
    optimizer.step()
    assert [p.tolist() for p in (a, b, c)] == [[-2, -1], [-1, -2], [-2, -1]]


def test_a_mask_of_one_row_may_be_expanded_to_the_cohort():
    theta, mask = torch.zeros(3, 4), torch.tensor([True, False, True, False])
    optimizer = SparseSGDM([theta], lr=1.0, masks=[mask.expand_as(theta)])
    theta.grad = torch.ones(3, 4)
    optimizer.step()
    assert theta.tolist() == [[-1, 0, -1, 0]] * 3
    place = TrainedIndex.of(mask.expand_as(theta), theta)
    assert (place.shape, place.positions.tolist()) == ((3, 4), [0, 2])  # the index of one row


UNIT = torch.tensor([True, False, True, True])


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (UNIT[:, None].repeat(1, 6), (4, 6)),
        (UNIT[:, None, None].repeat(1, 2, 3), (4, 6)),
        (torch.arange(24).reshape(4, 6) % 3 == 0, (24,)),
        (UNIT, (4,)),
        (UNIT.expand(3, 4), (3, 4)),
    ],
    ids=["units", "channels", "coordinates", "vector", "cohort"],
)
def test_any_chunk_of_units_coordinates_or_clients_equals_torch(mask, shape, chunk):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs, start = (randoms([mask.shape])[0] for _ in range(3))
    place, sizes, sgd = TrainedIndex.of(mask, ours), [], torch.optim.SGD([theirs], foreach=False, **options)
    velocity = ours.new_empty(place.gathered)
    for step in range(4):
        theirs.grad = randoms([mask.shape], seed=step)[0]
        sgd.step()
        for values, grad, (part,), _ in place.trained(ours, theirs.grad, velocity, chunk=chunk):
            sgdm_update(values, grad, part, fresh=step == 0, **options)
            sizes.append(values.numel())
    assert bits(ours) == bits(torch.where(mask, theirs, start))
    assert (place.shape, sum(sizes)) == (shape, 4 * int(mask.sum()))
    assert max(sizes) <= max(chunk, place.numel // len(place.positions))


def test_momentum_and_index_cost_eight_bytes_for_each_coordinate_that_trains():
    """At ratio 0.8 that is 1.6 bytes a coordinate; dense momentum is 4."""
    param = torch.zeros(100, 100)
    mask = torch.zeros(10_000, dtype=torch.bool)
    mask[torch.randperm(10_000, generator=generator(4))[:2000]] = True
    optimizer = SparseSGDM([param], lr=0.1, masks=[mask.view(100, 100)])
    walk(optimizer, [param], 2)
    held = [optimizer.state[param]["momentum_buffer"], *(place.positions for place in optimizer._indices.values())]
    assert sum(t.untyped_storage().nbytes() for t in held) == 16_000


def test_momentum_of_another_mask_is_refused():
    params = [torch.zeros(4), torch.zeros(4)]
    first, second = (SparseSGDM([p], lr=0.1) for p in params)
    first.set_masks([UNIT])
    walk(first, params[:1], 1)
    second.load_state_dict(first.state_dict())
    params[1].grad = torch.ones(4)
    with pytest.raises(ValueError, match="momentum of 3 coordinates does not fit a parameter of 4"):
        second.step()


def test_a_parameter_with_gaps_cannot_be_masked():
    with pytest.raises(ValueError, match=r"masks\[0\] is for a parameter with gaps in its memory"):
        SparseSGDM([torch.zeros(4, 6)[:, :3]], lr=0.1, masks=[torch.ones(4, 3, dtype=torch.bool)])


def test_channels_last_weights_and_gradients_of_another_layout():
    mask = torch.rand((4, 3, 2, 2), generator=generator(3)) < 0.5
    start, grad = randoms([(4, 3, 2, 2)] * 2)
    param = start.clone(memory_format=torch.channels_last)
    optimizer = SparseSGDM([param], lr=0.5, masks=[mask])
    param.grad = grad
    optimizer.step()
    assert bits(param) == bits(torch.where(mask, start.sub(grad, alpha=0.5), start))


def test_a_parameter_with_strides_of_its_own_trains_where_its_mask_says():
    param, mask = torch.zeros(3, 2).t(), torch.tensor([[True, False, True], [False, False, True]])
    optimizer = SparseSGDM([param], lr=1.0, masks=[mask])
    param.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(param == -1, mask)


def test_a_deep_copy_keeps_its_masks():
    param = torch.zeros(2)
    optimizer = SparseSGDM([param], lr=1.0, masks=[torch.tensor([True, False])])
    twin = copy.deepcopy(optimizer)
    copied = twin.param_groups[0]["params"][0]
    copied.grad = torch.ones(2)
    twin.step()
    assert copied.tolist() == [-1, 0]
    assert param.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({"lr": lr}, "optimizer.lr") for lr in (0, -0.1, math.nan, math.inf, "0.1", None, True)),
        *(({"momentum": m}, "optimizer.momentum") for m in (-0.1, 1, math.nan, "x")),
        *(({"dampening": d, "nesterov": False}, "optimizer.dampening") for d in (-1, math.inf)),
        *(({"weight_decay": w}, "optimizer.weight_decay") for w in (-1e-4, math.nan, None)),
        ({"nesterov": True, "momentum": 0.0}, "optimizer.nesterov"),
        ({"nesterov": True, "dampening": 0.1}, "optimizer.nesterov"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        SparseSGDM([torch.zeros(2)], **{"lr": 0.1, **options})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=named):
        SparseSGDM([{"params": [torch.zeros(2)], **options}], lr=0.1)


@pytest.mark.parametrize(
    ("masks", "named"),
    [
        ([None], "masks has 1 entries, but there are 2 parameters"),
        ([None, torch.ones(3, dtype=torch.bool)], r"masks\[1\] has shape \(3,\); its parameter has \(2, 2\)"),
        ([torch.ones(4), None], r"masks\[0\] is torch.float32"),
        ([torch.ones(4, dtype=torch.uint8), None], r"masks\[0\] is torch.uint8"),
        ([[True] * 4, None], r"masks\[0\] is list; it must be a bool tensor of shape \(4,\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_the_old_ones_stay(masks, named):
    params = [torch.zeros(4), torch.zeros(2, 2)]
    optimizer = SparseSGDM(params, lr=1.0, masks=[torch.tensor([True, False, False, False]), None])
    with pytest.raises(ValueError, match=named):
        optimizer.set_masks(masks)
    params[0].grad = torch.ones(4)
    optimizer.step()
    assert params[0].tolist() == [-1, 0, 0, 0]


FIRST, SECOND = torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])  # as many ones


def _stored(kind, mask):
    param = torch.ones(4)
    optimizer = kind([param], lr=0.1, masks=[mask])
    param.grad = torch.arange(1.0, 5.0)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("kind", [SparseSGDM, SparseAdam])
def test_moments_of_another_mask_with_as_many_ones_are_refused(kind):
    state = _stored(kind, FIRST)
    with pytest.raises(ValueError, match="moments of parameter 0 were stored under another mask; give that one before"):
        kind([torch.ones(4)], lr=0.1, masks=[SECOND]).load_state_dict(state)
    kind([torch.ones(4)], lr=0.1, masks=[FIRST]).load_state_dict(state)
    older = {**state, "param_groups": [{k: v for k, v in g.items() if k != "masks"} for g in state["param_groups"]]}
    kind([torch.ones(4)], lr=0.1, masks=[FIRST]).load_state_dict(older)


@pytest.mark.parametrize("kind", [SparseAdam, FedAdam, FedYogi, FedAdagrad])
def test_what_squares_gradients_refuses_complex_parameters(kind):
    with pytest.raises(ValueError, match="needs dense parameters of real floating-point numbers, not torch.complex64"):
        kind([torch.ones(3, dtype=torch.complex64)], lr=0.1)


@pytest.mark.parametrize("kind", [SparseSGDM, SparseAdam, FedAdam])
def test_whole_numbers_and_sparse_layouts_are_refused(kind):
    with pytest.raises(ValueError, match=r"not torch.int64, torch.strided"):
        kind([torch.ones(3, dtype=torch.int64)], lr=0.1)
    with pytest.raises(ValueError, match=r"not torch.float32, torch.sparse_coo"):
        kind([torch.ones(3).to_sparse()], lr=0.1)


def test_complex_parameters_move_as_torchs_sgd_moves_them():
    start, steep = torch.complex(torch.ones(3), -torch.ones(3)), torch.complex(torch.arange(3.0), torch.ones(3))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    moved = []
    for make in (SparseSGDM, torch.optim.SGD):
        param = start.clone()
        optimizer = make([param], **options)
        for _ in range(3):
            param.grad = steep.clone()
            optimizer.step()
        moved.append(param)
    assert torch.equal(*moved)
