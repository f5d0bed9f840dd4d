"""Half precision: everything trains, and a coordinate outside the mask keeps its bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from plain import plain_fedavg, replay
from small import Small, small_data, small_net, uneven_parts

from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.precision import HalfPrecision

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]


def options(precision):
    half = [HalfPrecision(torch.device("cpu"))]
    return {"plugins": half} if precision == "16-mixed" else {"precision": precision}


def a_mask(size):
    return torch.rand(size, generator=torch.Generator().manual_seed(5)) < 0.4


def a_small(cohort=1, **extra):
    """Its tensors are small, and yet take gradients of their own in each step, as large ones do."""
    client = partial(ClientModule, large=1)
    net = small_net(torch.float32)
    mask = a_mask(sum(p.numel() for p in net.parameters()))
    return Small(net, small_data(dtype=torch.float32), uneven_parts(), mask=mask, cohort=cohort, client=client, **extra)


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_trains_and_frozen_coordinates_keep_their_bits(tmp_path, precision, cohort):
    small = a_small(cohort)
    with torch.no_grad():
        small.net[1].weight.view(-1)[:3] = torch.tensor([-0.0, 1e-30, 65519.0 / 3])  # what float16 cannot hold
    small.net[1].weight.data.clamp_(max=1.0)
    before = small.row.view(torch.int32).clone()
    small.fit(6, tmp_path, **options(precision))
    after = small.row
    assert torch.equal(after.view(torch.int32)[~small.mask], before[~small.mask])
    assert not torch.equal(after.view(torch.int32)[small.mask], before[small.mask])
    assert small.federation.dropped == []
    assert small.rounds.loss < 1.0  # chance is log 3 = 1.10


@pytest.mark.parametrize(("precision", "off"), [("bf16-mixed", 0.05), ("16-mixed", 0.01)])
def test_half_precision_ends_near_the_full_one(tmp_path, precision, off):
    small = a_small(momentum=0.0)
    expected, _ = plain_fedavg(
        small.net, small.dataset.train.x, small.dataset.train.y, replay(small.plan, 3), lr=small.lr,
        masks=small.space.unflatten(small.mask),
    )  # fmt: skip
    got = small.fit(3, tmp_path, **options(precision)).row
    difference = (got - small.space.read(expected)).abs().max()
    assert 0 < difference < off


class OuterAutocast(MixedPrecision):
    """One autocast around all local steps of a cohort, as Lightning's was up to 2.5.4 with its cache of weights."""

    def __init__(self, cached):
        super().__init__("bf16-mixed", "cpu")
        self.cached = cached

    def autocast_context_manager(self):
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=self.cached)


@pytest.mark.parametrize("cohort", [1, 3])
def test_every_local_step_sees_the_weights_as_they_are_now_whatever_autocast_keeps(tmp_path, cohort):
    cached, fresh = (a_small(cohort).fit(3, tmp_path, plugins=[OuterAutocast(kept)]) for kept in (True, False))
    assert torch.equal(cached.row, fresh.row)


def test_a_loss_that_overflows_at_the_usual_scale_is_scaled_less_and_not_skipped(tmp_path):
    """Gradients of about 500: times 1024 they are beyond float16, times 64 they are not."""
    small = a_small(lr=1e-6, momentum=0.0)

    def steep(forward, x, y):
        return 500 * torch.nn.functional.cross_entropy(forward(x), y, reduction="none")

    small.module.losses = steep
    before = small.row
    small.fit(1, tmp_path, **options("16-mixed"))
    moved = small.row - before
    plain = a_small(lr=1e-6 * 500, momentum=0.0)  # the same step at full precision
    plain.fit(1, tmp_path)
    torch.testing.assert_close(moved, plain.row - before, rtol=0.05, atol=2e-6)
    assert float(moved.abs().max()) > 1e-5


@pytest.mark.parametrize(("precision", "tries"), [("32-true", 1), ("bf16-mixed", 1), ("16-mixed", 19)])
def test_only_float16_tries_a_gradient_that_is_not_finite_again(tmp_path, precision, tries):
    """From 1024 down to 2**-8, each scale half of the one before: 19 of them."""
    small, seen = a_small(count=7), []
    small.dataset.train.x[torch.from_numpy(small.parts[6])] = torch.inf

    def counted(forward, x, y):
        seen.append(bool(x.isfinite().all()))
        return torch.nn.functional.cross_entropy(forward(x), y, reduction="none")

    small.module.losses = counted
    small.fit(1, tmp_path, limit_val_batches=0, **options(precision))
    assert seen.count(True) == 6 * 3  # six clients, three steps each
    assert seen.count(False) == 3 * tries


@pytest.mark.parametrize("cohort", [1, 3])
def test_a_client_that_diverges_is_dropped_and_the_others_train(tmp_path, cohort):
    small = a_small(cohort, count=7)
    small.dataset.train.x[torch.from_numpy(small.parts[6])] = torch.inf
    small.fit(1, tmp_path, **options("16-mixed"))
    assert {d.client for d in small.federation.dropped} == {6}
    assert small.row.isfinite().all()


def test_precision_16_from_the_command_line(run_in):
    summary, _ = run_in("half", "trainer.precision=16-mixed", "trainer.accelerator=cpu", "mask_rule=random")
    assert summary["dropped_updates"] == 0
    assert summary["test/acc"] > 0.5
