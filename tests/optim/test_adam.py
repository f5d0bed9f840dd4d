"""SparseAdam against torch's Adam and AdamW where it trains, and against clients of their own where K are stacked."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from plain import replay
from plain_sparse import gradient
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core.subspace import CHUNK
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.masks.bitmaps import pack
from fedsparse.optim.adam import SparseAdam, adam_update, corrections
from fedsparse.optim.sgdm import SparseSGDM

TORCH = {False: torch.optim.Adam, True: torch.optim.AdamW}
OPTIONS = [{"weight_decay": decay, "decoupled": decoupled} for decay in (0.0, 0.1) for decoupled in (False, True)]
SHAPES = [(), (7,), (3, 5), (2, 3, 3, 3), (1, 1000), (0,), (4000,)]
options_ = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randoms(shapes, dtype=torch.float32, seed=0):
    source = generator(seed)
    return [torch.randn(shape, generator=source, dtype=dtype) for shape in shapes]


def theirs_of(params, lr=0.05, decoupled=False, **options):
    return TORCH[decoupled](params, lr=lr, foreach=False, **options)


def walk(optimizer, params, steps, seed=1):
    """Step with the same gradients for the same seed."""
    for step in range(steps):
        grads = randoms([p.shape for p in params], params[0].dtype, seed * 1000 + step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def bits(tensor):
    return tensor.detach().contiguous().numpy().tobytes()


@options_
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [1.0, 0.4])
def test_where_it_trains_it_equals_torch_over_100_steps(options, dtype, trained):
    equals_torch(SHAPES, 100, options, dtype, trained)


@options_
@pytest.mark.parametrize("trained", [1.0, 0.4])
def test_a_large_parameter_in_chunks_equals_torch(options, trained):
    assert CHUNK < 0.4 * 400_001
    equals_torch([(400_001,), (4, 100_000)], 3, options, torch.float32, trained)


def equals_torch(shapes, steps, options, dtype, trained):
    """Step parameters and torch's beside them: bit for bit where they train, and moments nowhere else."""
    ours, theirs, start = (randoms(shapes, dtype) for _ in range(3))
    masks = [torch.rand(shape, generator=generator(9)) < trained for shape in shapes]
    walk(sparse := SparseAdam(ours, lr=0.05, masks=masks, **options), ours, steps)
    walk(theirs_of(theirs, **options), theirs, steps)
    for own, other, first, mask in zip(ours, theirs, start, masks, strict=True):
        assert bits(own) == bits(torch.where(mask, other, first))
    held = [state[name].numel() for state in sparse.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(held) == 2 * sum(int(mask.sum()) for mask in masks)


@options_
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_frozen_coordinates_keep_every_bit(options, dtype):
    odd = [-0.0, 0.0, 1.5, math.inf, -math.inf, math.nan, 1e-30, -0.0]
    param = torch.tensor([*odd, 1.0], dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
    before = param.clone().view(integer)
    mask = torch.tensor([False] * len(odd) + [True])
    optimizer = SparseAdam([param], lr=0.1, masks=[mask], **options)
    for value in (math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0):
        param.grad = torch.tensor([value] * len(odd) + [1.0], dtype=dtype)
        optimizer.step()
    assert torch.equal(param.view(integer)[:-1], before[:-1])
    assert param[-1].isfinite()
    assert param[-1] != 1


@pytest.mark.parametrize("decoupled", [False, True])
def test_two_steps_by_hand(decoupled):
    """With betas of 0.5, gradients 1 and 3: m = 0.5, 1.75 over 0.5, 0.75; v = 0.5, 4.75 over the same; epsilon 1."""
    param = torch.tensor([2.0], dtype=torch.float64)
    optimizer = SparseAdam([param], 0.1, betas=(0.5, 0.5), eps=1.0, decoupled=decoupled, weight_decay=0.5 * decoupled)
    x = 2.0
    for grad, m, v in ((1.0, 1.0, 1.0), (3.0, 1.75 / 0.75, 4.75 / 0.75)):
        param.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        x = x * (0.95 if decoupled else 1.0) - 0.1 * m / (math.sqrt(v) + 1.0)
        assert param.item() == pytest.approx(x, rel=1e-14)


def test_a_schedule_that_ends_at_zero_keeps_minus_zero():
    param = torch.tensor([-0.0])
    optimizer = SparseAdam([param], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0
    param.grad = torch.ones(1)
    optimizer.step()
    assert bits(param) == bits(torch.tensor([-0.0]))


@options_
def test_reset_is_a_fresh_optimizer_in_the_same_memory(options):
    mask = torch.rand((3, 5), generator=generator(2)) < 0.5
    used, fresh = randoms([(3, 5)])[0], randoms([(3, 5)])[0]
    optimizer = SparseAdam([used], lr=0.1, masks=[mask], **options)
    walk(optimizer, [used], 4)
    memory = [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
    used.copy_(fresh)
    optimizer.reset()
    walk(optimizer, [used], 5, seed=2)
    walk(SparseAdam([fresh], lr=0.1, masks=[mask], **options), [fresh], 5, seed=2)
    assert bits(used) == bits(fresh)
    assert memory == [s["exp_avg"].data_ptr() for s in optimizer.state.values()]


@pytest.mark.parametrize("clients", [None, 3])
def test_a_loaded_state_and_a_deep_copy_go_on_bit_equal(clients, tmp_path):
    mask = torch.rand((3, 5), generator=generator(2)) < 0.5
    ours = randoms([(3, 5)])
    walk(first := SparseAdam(ours, lr=0.1, masks=[mask]), ours, 3)
    if clients:
        first.rows(clients)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    loaded, twin = [ours[0].clone()], copy.deepcopy(first)
    second = SparseAdam(loaded, lr=0.7, masks=[mask])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied = twin.param_groups[0]["params"]
    for optimizer, params in ((first, ours), (second, loaded), (twin, copied)):
        walk(optimizer, params, 3, seed=4)
    assert bits(ours[0]) == bits(loaded[0]) == bits(copied[0])


def test_a_coordinate_frozen_between_steps_starts_again_without_moments():
    """Its moments after the third step are those of one gradient, the count of steps is 3."""
    param = torch.zeros(2, dtype=torch.float64)
    walk(optimizer := SparseAdam([param], lr=1.0), [param], 2)
    optimizer.set_masks([torch.tensor([True, False])])
    optimizer.set_masks([None])
    before = param[1].item()
    param.grad = torch.full((2,), 4.0, dtype=torch.float64)
    optimizer.step()
    m, v = 0.1 * 4 / (1 - 0.9**3), 0.001 * 16 / (1 - 0.999**3)
    assert param[1].item() == pytest.approx(before - m / (math.sqrt(v) + 1e-8), rel=1e-12)


def test_a_dense_state_is_gathered_and_one_of_another_mask_refused():
    mask = torch.tensor([True, False, True, True])
    dense, other = torch.ones(4), torch.ones(4)
    walk(first := SparseAdam([dense], lr=0.1), [dense], 2)
    masked = SparseAdam([other], lr=0.1, masks=[mask])
    other.copy_(dense)
    masked.load_state_dict(copy.deepcopy(first.state_dict()))
    walk(first, [dense], 2, seed=3)
    walk(masked, [other], 2, seed=3)
    assert bits(other[mask]) == bits(dense[mask])
    with pytest.raises(ValueError, match="momentum of 3 coordinates does not fit a parameter of 4"):
        _step_loaded(masked.state_dict())


def _step_loaded(state):
    param = torch.zeros(4)
    optimizer = SparseAdam([param], lr=0.1)
    optimizer.load_state_dict(state)
    walk(optimizer, [param], 1)


ROW = torch.rand(40, generator=generator(3)) < 0.4
OWN = torch.stack([torch.rand(40, generator=generator(10 + k)) < 0.2 * (k + 1) for k in range(4)])
UNITS = torch.tensor([True, False, True, True])[:, None].expand(4, 40).clone()
MASKS = {
    "dense": lambda times: None,
    "one mask": lambda times: ROW.repeat(times).expand(4, -1),
    "own masks": lambda times: OWN.repeat(1, times),
    "whole clients": lambda times: UNITS.repeat(1, times),
}
# live clients of each step: one begins late, one ends early, one is never there
LIVE = [{0, 1}, {0, 1, 2}, {0, 2}, {1}, {0, 1, 2}, {2}, {0, 1, 2}]
MAKES = {
    "sgdm": (partial(SparseSGDM, lr=0.1, weight_decay=0.1), partial(torch.optim.SGD, momentum=0.9, foreach=False)),
    "adam": (partial(SparseAdam, lr=0.1, weight_decay=0.1), partial(torch.optim.Adam, foreach=False)),
    "adamw": (
        partial(SparseAdam, lr=0.1, weight_decay=0.1, decoupled=True),
        partial(torch.optim.AdamW, foreach=False),
    ),
}


def step_live(optimizer, theta, live):
    """Step some clients only, as the client module does."""
    dead, states = [k for k in range(len(theta)) if k not in live], optimizer.rows(len(theta))
    before = [(view, view.clone()) for k in dead for view in (theta[k], *states[k])]
    optimizer.step()
    for view, old in before:
        view.copy_(old)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1), (torch.float64, 1), (torch.float32, 2500)])
def test_clients_of_ragged_steps_equal_torch_each_by_itself(make, mask, dtype, times):
    """Bit for bit; in the second round all start anew from where they are, and what is not theirs is NaN.

    With 2500 times as many coordinates each mask lets several chunks train.
    """
    mask, shape = MASKS[mask](times), (4, 40 * times)
    ours, theirs = MAKES[make]
    theta = randoms([shape], dtype)[0]
    masks = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    alone = [row.clone() for row in theta]
    optimizer = ours([theta])
    optimizer.set_masks([mask])
    for r in range(2):
        optimizer.reset()
        each = [theirs([row], lr=0.1, weight_decay=0.1) for row in alone]
        for step, live in enumerate(LIVE):
            grads = randoms([shape], dtype, 100 * r + step)[0]
            theta.grad = torch.where(masks, grads, math.nan)
            theta.grad[[k for k in range(4) if k not in live]] = math.nan
            step_live(optimizer, theta, live)
            for k in live:
                start, alone[k].grad = alone[k].clone(), grads[k]
                each[k].step()
                alone[k].copy_(torch.where(masks[k], alone[k], start))
    assert [bits(row) for row in theta] == [bits(row) for row in alone]


def test_the_steps_of_clients_are_counted_apart_only_once_they_differ():
    theta = torch.zeros(3, 4)
    walk(optimizer := SparseAdam([theta], lr=0.1), [theta], 2)
    assert optimizer.state[theta]["step"].shape == ()
    step_live(optimizer, theta, {0, 2})
    assert optimizer.state[theta]["step"].tolist() == [3, 2, 3]
    assert [[view.numel() for view in views] for views in optimizer.rows(3)] == [[4, 4, 1]] * 3


def test_corrections_by_hand():
    assert corrections([2.0, 2.0], (0.5, 0.75)) == (0.75, math.sqrt(0.4375))
    first, second = corrections([1.0, 2.0], (0.5, 0.75))
    assert (first.tolist(), second.tolist()) == ([0.5, 0.75], [0.5, math.sqrt(0.4375)])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({"lr": lr}, "optimizer.lr") for lr in (0, -0.1, math.nan, "0.1", True)),
        *(({"betas": b}, "optimizer.betas") for b in (0.9, (0.9,), (0.9, 1), (-0.1, 0.9), ("x", 0.9), None)),
        *(({"eps": e}, "optimizer.eps") for e in (0, -1, math.inf, None)),
        *(({"weight_decay": w}, "optimizer.weight_decay") for w in (-1e-4, math.nan)),
        ({"decoupled": "yes"}, "optimizer.decoupled"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        SparseAdam([torch.zeros(2)], **{"lr": 0.1, **options})
    assert "\n" not in str(caught.value)


def plain_rounds(small, masks, rounds, **options):
    """Federated averaging with torch's Adam: each coordinate's mean over those who train it, weighted by samples."""
    row, dealt = small.row.clone(), replay(small.plan, rounds)
    for r, clients in enumerate(dealt):
        sums, weights = torch.zeros_like(row), torch.zeros_like(row)
        for (batches, weight), client in zip(clients, small.plan.sample(r), strict=True):
            own, mask = row.clone(), masks[client]
            optimizer = theirs_of([own], small.lr, **options)
            for batch in batches:
                own.grad = torch.where(mask, gradient(small.net, own, *_split(small), batch), 0.0)
                optimizer.step()
                own.copy_(torch.where(mask, own, row))
            sums, weights = sums + weight * torch.where(mask, own - row, 0.0), weights + weight * mask
        row = torch.where(weights > 0, row + sums / weights.clamp(min=1e-300), row)
    return row


def _split(small):
    return small.dataset.train.x, small.dataset.train.y


@pytest.mark.parametrize("cohort", [1, 3, 20])
@pytest.mark.parametrize("owner", ["nobody", "all", "client"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_ragged_rounds_equal_a_plain_loop_whatever_the_cohort(tmp_path, cohort, owner, decoupled):
    """float64, so that 1e-9 is far above rounding; an epsilon of 1e-4 keeps m / sqrt(v) from blowing it up near v = 0.

    Own masks are of different sizes, as whole units make them.
    """
    options = {"eps": 1e-4, "weight_decay": 0.05, "decoupled": decoupled}
    small = _small(owner, cohort, options)
    masks = _masks(owner, small.space.size)
    expected, start = plain_rounds(small, masks, 2, **options), small.row.clone()
    got = small.fit(2, tmp_path).row
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(got, start, atol=1e-3)


def _masks(owner, size):
    if owner == "nobody":
        return torch.ones(7, size, dtype=torch.bool)
    share = torch.linspace(0.1, 0.5, 7) if owner == "client" else torch.full((7,), 0.3)
    rows = torch.rand(7, size, generator=generator(5)) < share.unsqueeze(1)
    return rows if owner == "client" else rows[:1].expand(7, size)


def _small(owner, cohort, options):
    net = small_net()
    rows = _masks(owner, sum(p.numel() for p in net.parameters()))
    small = Small(
        net, small_data(), uneven_parts(), cohort=cohort, work=LocalWork(8, None, 2), lr=0.01,
        mask=None if owner == "nobody" else rows.any(0), make=partial(SparseAdam, **options),
    )  # fmt: skip
    if owner == "client":
        small.module.set_mask(rows.any(0), torch.stack([pack(row) for row in rows]))
        small.given["exchange"] = Exchange(rows.any(0), small.space.local, small.module.own_masks)
    return small


def test_adam_update_leaves_the_gradient():
    param, grad, m, v = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    adam_update(param, grad, m, v, correction=corrections([1.0], (0.9, 0.999)), lr=0.1, weight_decay=0.5)
    assert grad.tolist() == [1, 1, 1]
