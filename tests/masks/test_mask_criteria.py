"""SNIP, SynFlow and movement against plain autograd, loops and numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from small import Small, small_data, small_net, uneven_parts
from torch import nn
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.masks import Evidence, Gradual, Sparsity, Updates, choose
from fedsparse.masks.bitmaps import masks_of
from fedsparse.masks.rules import Movement, Random, Snip, SynFlow, Talos
from fedsparse.masks.thinning import shrunk, thin
from fedsparse.preparation.calibration import Calibration, CalibrationJob, calibrate, calibrate_clients, observe
from fedsparse.preparation.preparation import Preparation

HEAD = "3.*"
SAMPLED = {0: [3, 5], 1: [6, 3]}


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


@pytest.fixture
def preparation():
    """Batches of whole shards, so that the order in which they are dealt does not matter."""
    small = Small(small_net(), small_data(), uneven_parts())
    return Preparation(
        net=small.net, space=small.space, dataset=small.dataset, parts=small.parts,
        sample=lambda round, purpose: SAMPLED[round], losses=small.module.losses, batch_size=1000, seed=0,
        ledger=Ledger(), model_length=777,
    )  # fmt: skip


def job(rule, **calibration):
    return CalibrationJob(rule, Sparsity(0.6, always_train=HEAD), Calibration(**calibration), HEAD)


# --- SNIP


def test_snip_by_hand():
    """loss = w x y: for x = 2, 1 and y = 1, -3 the gradients by w_0 are 2, -3, by w_1 4 and 0: sums -1 and 4."""
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[-5.0, 0.5]])
    space, x, y = ParamSpace.of(net), torch.tensor([[2.0, 4.0], [1.0, 0.0]]), torch.tensor([1.0, -3.0])
    rule, product = Snip(), lambda forward, x, y: forward(x).squeeze(1) * y
    observed = rule.observe(net, space, x, y, loss=product)
    assert observed.tolist() == [-1.0, 4.0]
    assert rule.scores(Evidence(space, space.read(net), Sparsity(), observed=observed)).tolist() == [5.0, 2.0]


def test_snip_is_the_gradient_of_everybodys_mean_loss_times_the_weight(preparation):
    """As if one had all samples of two rounds: the third client was drawn twice."""
    index = torch.cat([torch.from_numpy(preparation.parts[client]) for round in (0, 1) for client in SAMPLED[round]])
    split, net = preparation.dataset.train, copy.deepcopy(preparation.net).eval()
    cross_entropy(net(split.x[index]), split.y[index]).backward()
    expected = torch.cat([(p.grad * p.detach()).abs().flatten() for p in net.parameters()])
    rule = Snip()
    observed = observe(preparation, job(rule, rounds=2))
    found = rule.scores(
        Evidence(preparation.space, preparation.space.read(preparation.net), Sparsity(), observed=observed)
    )
    torch.testing.assert_close(found / len(index), expected.double(), rtol=1e-9, atol=1e-14)
    assert preparation.ledger.bytes_setup_up == 4 * (
        HEADER.size + 8 * preparation.space.size
    )  # in the net's own float64


def test_snip_needs_data():
    with pytest.raises(ValueError, match="evidence.observed is None; for a rule that needs batches"):
        choose(Snip(), Evidence(ParamSpace(["w"], [torch.Size([4])]), torch.ones(4), Sparsity()))


# --- SynFlow


def linear_net():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data, net[1].weight.data = torch.tensor([[1.0, -2.0], [-3.0, 0.5]]), torch.tensor([[-1.0, 2.0]])
    return net


def flow(net, x):
    return SynFlow().observe(net, ParamSpace.of(net), x, torch.zeros(len(x)), loss=losses)


def test_synflow_of_two_linear_layers_by_hand():
    """R = |w2_1| (|w_11| + |w_12|) + |w2_2| (|w_21| + |w_22|) = 1 * 3 + 2 * 3.5 = 10, the sum of a layer's scores."""
    found = flow(linear_net(), torch.tensor([[9.0, -9.0]]))
    assert found.tolist() == [1, 2, 6, 1, 3, 7]
    assert found.dtype == torch.float64
    assert found[:4].sum() == found[4:].sum() == 10


def test_synflow_in_two_iterations_by_hand():
    """Density 1/4: 3 of 6 are left after the first, 1.5 rounded up after the second, scored without the others.

    First 7, 6, 3 (w2_2, w_21, w2_1). Then without w_11 and w_12 no path leads over w2_1: 0, and 6, 6.
    """
    net, space = linear_net(), ParamSpace.of(linear_net())
    row, rule, state, sparsity = space.read(net), SynFlow(2), None, Sparsity(0.75)
    kept = []
    for round in range(2):
        space.write(net, shrunk(row, state, rule.calibration.shrink))
        observed = rule.observe(net, space, torch.ones(1, 2), torch.ones(1), loss=losses)
        state = thin(observed, state, space, sparsity, largest=True, power=(round + 1) / 2)
        kept.append(state.nonzero().flatten().tolist())
    assert kept == [[2, 4, 5], [2, 5]]
    flows = flow(linear_net(), torch.ones(1, 2))
    at_once = thin(flows, None, space, sparsity, largest=True, power=1.0)
    assert at_once.nonzero().flatten().tolist() == [2, 5]


def plain_synflow(net, x, ratio, iterations, head):
    """Absolute weights, a mask multiplied in, sorted lists: slow."""
    net = copy.deepcopy(net).double().eval()
    parameters = list(net.parameters())
    for p in parameters:
        p.data.abs_()
    counted = np.flatnonzero(~head.numpy())
    start, alive = torch.cat([p.data.flatten() for p in parameters]), np.ones(len(head), dtype=bool)
    for i in range(iterations):
        nn.utils.vector_to_parameters(start * torch.from_numpy(alive), parameters)
        gradients = torch.autograd.grad(net(torch.ones_like(x[:1]).double()).sum(), parameters)
        scores = torch.cat([(g * p).detach().flatten() for g, p in zip(gradients, parameters, strict=True)]).numpy()
        k = math.floor((1 - ratio) ** ((i + 1) / iterations) * len(counted) + 0.5)
        order = sorted((j for j in counted if alive[j]), key=lambda j: (-scores[j], j))
        alive[counted] = False
        alive[order[:k]] = True
    return alive


@pytest.mark.parametrize("iterations", [1, 7])
def test_synflow_equals_a_plain_loop_and_asks_no_client(preparation, iterations):
    before = copy.deepcopy(preparation.net.state_dict())
    found = calibrate(preparation, job(SynFlow(iterations)))
    head = preparation.space.where(HEAD)
    expected = plain_synflow(preparation.net, preparation.dataset.val.x, 0.6, iterations, head)
    assert found.mask.row(preparation.space).tolist() == expected.tolist()
    assert found.overlap == ()
    assert preparation.ledger.bytes_total == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in preparation.net.state_dict().items())


def test_synflow_never_reads_a_sample(preparation):
    """Only the shape of an input reaches the rule."""
    seen = []

    class Spy(SynFlow):
        def observe(self, net, space, x, y, **options):
            seen.append((x.abs().sum().item(), tuple(x.shape)))
            return super().observe(net, space, x, y, **options)

    calibrate(preparation, job(Spy(2)))
    assert seen == [(0.0, (1, *preparation.dataset.val.x.shape[1:]))] * 2


def test_own_masks_by_synflow_are_the_same_for_everybody(preparation):
    masks = masks_of(calibrate_clients(preparation, job(SynFlow(2))).bitmaps, preparation.space)
    assert all(mask.overlap(masks[0]) == 1 for mask in masks)


@pytest.mark.parametrize("kind", ["vit", "batchnorm"])
def test_synflow_runs_in_eval_mode_and_leaves_any_network_alone(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(3)
        )
        net(torch.ones(2, 1, 8, 8))
        if kind == "vit":
            net = timm.models.vision_transformer.VisionTransformer(
                img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=3
            )
            nn.init.normal_(net.head.weight)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(3, 1, 8, 8)
    first, second = flow(net, x), flow(net, -x)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert (first != 0).any()
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_synflow_refuses_text_and_other_iterations():
    with pytest.raises(ValueError, match="text has none"):
        flow(linear_net(), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^mask_rule\.iterations is 0; it must be a whole number of 1 or more$"):
        SynFlow(0)


@pytest.mark.parametrize("rule", [SynFlow(6), Talos()])
def test_every_tensor_keeps_its_share_in_every_round_of_thinning(preparation, rule):
    preparation = replace(preparation, sample=lambda round, purpose: [3, 5])
    sparsity = Sparsity(0.9, min_density=0.05, always_train=HEAD)
    mask = calibrate(preparation, CalibrationJob(rule, sparsity, Calibration(rounds=6), HEAD)).mask
    counted = ~preparation.space.where(HEAD)
    assert int(mask.row(preparation.space)[counted].sum()) == math.floor(0.1 * int(counted.sum()) + 0.5)
    assert all(int(marks.sum()) >= math.ceil(0.05 * marks.numel()) for marks in mask.tensors.values())


def test_synflow_under_a_schedule_gives_up_in_the_order_of_its_iterations(preparation):
    """Masks of a growing ratio lie within each other, and the last is that of the ratio alone."""
    alone = Sparsity(0.9, always_train=HEAD)
    growing = replace(alone, schedule=Gradual(initial=0.2, steps=3))
    rule, row = SynFlow(5), preparation.space.read(preparation.net)
    found = calibrate(preparation, CalibrationJob(rule, growing, Calibration(), HEAD))
    stages = [Evidence(preparation.space, row, growing.at(t), observed=found.observed) for t in range(4)]
    masks = [choose(rule, stage).row(preparation.space) for stage in stages]
    assert torch.equal(found.mask.row(preparation.space), masks[0])
    counted = int((~preparation.space.where(HEAD)).sum())
    kept = [int((mask & ~preparation.space.where(HEAD)).sum()) for mask in masks]
    assert kept == [math.floor((1 - growing.at(t).ratio) * counted + 0.5) for t in range(4)]
    assert all(bool((later <= earlier).all()) for earlier, later in zip(masks[:-1], masks[1:], strict=True))
    last = calibrate(preparation, CalibrationJob(SynFlow(5), alone, Calibration(), HEAD)).mask.row(preparation.space)
    assert torch.equal(masks[-1], last)


@pytest.mark.parametrize("rule", [Talos()])
def test_what_chooses_in_its_own_rounds_cannot_be_renewed(rule):
    for sparsity in (Sparsity(0.8, schedule=Gradual()), Sparsity(0.8, renew_every=3)):
        with pytest.raises(ValueError, match=f"{type(rule).__name__} chooses once") as caught:
            CalibrationJob(rule, sparsity, Calibration(), HEAD)
        assert "\n" not in str(caught.value)


def test_the_first_mask_has_the_ratio_of_round_zero(preparation):
    sparsity = Sparsity(0.8, always_train=HEAD, schedule=Gradual(initial=0.25, steps=4))
    mask = calibrate(preparation, CalibrationJob(Random(), sparsity, Calibration(), HEAD)).mask
    counted = ~preparation.space.where(HEAD)
    assert int(mask.row(preparation.space)[counted].sum()) == math.floor(0.75 * int(counted.sum()) + 0.5)
    assert mask.metadata["ratio"] == "0.25"


# --- movement


def test_movement_by_hand():
    """Two rounds of two clients: 2 -> 3, 1 and -1 -> -2, -1; away from zero is positive, whatever the sign."""
    rule, space = Movement(), ParamSpace(["w"], [torch.Size([3])])
    start = torch.tensor([[2.0, -1.0, 4.0]] * 2)
    rows, need = rule.of_update(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, -0.5]]), start), rule.need(Updates)
    assert rows.tolist() == [[2, 1, 0], [-2, 0, -2]]
    updates = need.gather(None, rows.double().mean(0))
    assert updates.tolist() == [0, 0.5, -1]
    updates = need.gather(updates, torch.tensor([0.75, 0.0, 0.5], dtype=torch.float64))
    assert updates.tolist() == [0.75, 0.5, -0.5]
    assert need.elsewhere(updates) == 0
    for ratio, expected in ((0.3, [0, 1]), (0.6, [0])):
        mask = choose(rule, Evidence(space, start[0], Sparsity(ratio), updates=updates))
        assert mask.row(space).nonzero().flatten().tolist() == expected


def test_movement_trains_everything_before_the_first_round():
    rule, space = Movement(), ParamSpace(["w"], [torch.Size([4])])
    gradual = Sparsity(0.8, schedule=Gradual())
    assert choose(rule, Evidence(space, torch.ones(4), gradual.at(0))).density == 1
    with pytest.raises(ValueError, match="mask_rule=movement chooses by what training moved") as caught:
        choose(rule, Evidence(space, torch.ones(4), Sparsity(0.8)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", [SynFlow(6), Talos()])
def test_whole_units_that_were_given_up_stay_out_without_a_warning(preparation, rule):
    """The next round's number can fit all that is left: the units given up are then no ties at the line."""
    sparsity = Sparsity(0.3, unit="output", always_train=HEAD)
    preparation = replace(preparation, sample=lambda round, purpose: [3, 5])
    mask = calibrate(preparation, CalibrationJob(rule, sparsity, Calibration(rounds=6), HEAD)).mask
    counted = ~preparation.space.where(HEAD)
    kept = int(mask.row(preparation.space)[counted].sum())
    assert 0 < kept <= math.floor(0.7 * int(counted.sum()) + 0.5)
