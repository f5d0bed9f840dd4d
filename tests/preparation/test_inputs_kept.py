"""A network that writes to its inputs computes what one that does not computes, and changes no data set.

``Doubles`` doubles its input in place, as a ``nn.ReLU(inplace=True)`` or a normalisation in place at the front may; its
oracle doubles a copy.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from small import Small, small_data, uneven_parts
from torch import nn
from torch.nn import functional as F

from fedsparse import export
from fedsparse.data.datamodule import SplitLoader
from fedsparse.data.datasets import Split
from fedsparse.federation.client.drift import GradientCorrection
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.masks import Sparsity
from fedsparse.masks.rules import Fisher
from fedsparse.models.flops import pruning_figures
from fedsparse.models.shrink import shrink
from fedsparse.preparation.calibration import Calibration, CalibrationJob, calibrate
from fedsparse.preparation.head import probe, solve
from fedsparse.preparation.preparation import Preparation
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.personal import Personal

HEAD = "4.*"
PARTS = ("train", "val", "test")


class Doubles(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class DoublesACopy(nn.Module):
    def forward(self, x):
        return x * 2


class Writing(ClientModule):
    """Own losses that write to inputs and labels where that hinders no gradient; clients then run under vmap."""

    def losses(self, forward, x, y):
        found = F.cross_entropy(forward(x), y, reduction="none")
        if not torch.is_grad_enabled():
            x.zero_()
            y.zero_()
        return found


def net(first, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(first(), nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def copies(dataset):
    return [tensor.clone() for part in PARTS for tensor in (getattr(dataset, part).x, getattr(dataset, part).y)]


def kept(dataset, before):
    return all(torch.equal(a, b) for a, b in zip(copies(dataset), before, strict=True))


def fitted(first, folder, client=ClientModule, **options):
    """Three rounds, validated after each; every client is evaluated on a part of the test split."""
    tests = [np.arange(i, 30, 3) for i in range(7)]
    personal, evaluation = Personal(), Evaluation(tests)
    small = Small(
        net(first), small_data(), uneven_parts(), client=client, data={"tests": tests, "eval_batch_size": 8},
        callbacks=[personal, evaluation], **options,
    )  # fmt: skip
    before, figures = copies(small.dataset), []
    note = evaluation.on_validation_epoch_end

    def noted(*args):
        note(*args)
        figures.append(dict(evaluation.figures))

    evaluation.on_validation_epoch_end = noted
    small.fit(3, folder)
    assert kept(small.dataset, before)
    assert len(figures) == 3
    return small.row, figures, personal.figures


@pytest.mark.parametrize("client", [ClientModule, Writing])
@pytest.mark.parametrize("cohort", [1, 2])
def test_training_and_every_evaluation(tmp_path, client, cohort):
    options = {"client": client, "cohort": cohort}
    row, figures, personal = fitted(Doubles, tmp_path, **options)
    wanted, expected, own = fitted(DoublesACopy, tmp_path, **options)
    assert torch.equal(row, wanted)
    assert figures == expected
    assert personal == own
    assert len({f["val/loss"] for f in figures}) == 3


def test_batches_of_a_split_are_copies():
    split = Split(torch.arange(12.0).view(6, 1, 2, 1), torch.arange(6))
    for _ in range(2):
        for x, y in SplitLoader(split, 4):
            x.fill_(-1)
            y.fill_(-1)
    assert torch.equal(split.x.flatten(), torch.arange(12.0))
    assert torch.equal(split.y, torch.arange(6))


@pytest.mark.parametrize("cohort", [1, 2])
def test_a_step_that_is_done_again_after_an_overflow(tmp_path, cohort):
    found = []
    for first in (Doubles, DoublesACopy):
        steep = net(first)
        steep[4].weight.data *= 1e4
        small = Small(steep, small_data(), uneven_parts(), cohort=cohort)
        clients = small.module.form(loss_scale=2.0**1023)  # the gradients overflow until it is smaller
        x, y = small.dataset.train.x[: 8 * cohort].clone(), small.dataset.train.y[: 8 * cohort]
        calls, backward = [], clients.rows.backward
        clients.rows.backward = lambda *args: calls.append(1) or backward(*args)  # noqa: B023
        shape = (8,) if cohort == 1 else (2, 8)
        losses = clients.step(x.view(*shape, 1, 3, 4), y.view(shape), (8,) * cohort, GradientCorrection())
        assert len(calls) > 1
        found.append((losses, clients.theta.detach().clone()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def preparation_of(first):
    small = Small(net(first), small_data(), uneven_parts())
    return Preparation(
        net=small.net, space=small.space, dataset=small.dataset, parts=small.parts,
        sample=lambda round, purpose: [3, 5], losses=small.module.losses, batch_size=16, seed=0,
        ledger=Ledger(), model_length=777,
    )  # fmt: skip


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("where", ["clients", "server"])
def test_calibration_and_the_head(labels, where):
    rows = []
    for first in (Doubles, DoublesACopy):
        preparation = preparation_of(first)
        before = copies(preparation.dataset)
        probe(preparation, HEAD, steps=2, lr=0.3)
        solve(preparation, HEAD, 1.0)
        measured = Calibration(where=where, labels=labels, rounds=2)
        found = calibrate(
            preparation, CalibrationJob(Fisher(True, labels=labels), Sparsity(0.6, always_train=HEAD), measured, HEAD)
        )
        assert kept(preparation.dataset, before)
        rows.append((preparation.space.read(preparation.net), found.observed))
    for a, b in zip(*rows, strict=True):
        assert torch.equal(a, b)


def test_a_model_without_a_batching_rule_is_tried_again_on_the_same_samples():
    """Its first try, under vmap, writes to its inputs before it fails."""
    from fedsparse.core.space import ParamSpace
    from fedsparse.masks.gradients import add_squares

    class Asks(nn.Module):
        def forward(self, x):
            return x if bool(x.sum() < 1e9) else -x  # which vmap cannot ask

    totals = []
    for first in (Doubles, DoublesACopy):
        model = net(first)
        model.insert(1, Asks())
        space, x = ParamSpace.of(model), small_data().train.x[:6].clone()
        total = torch.zeros(space.size, dtype=torch.float64)
        add_squares(
            total, model, space, x, torch.arange(6) % 3,
            loss=lambda forward, x, y: F.cross_entropy(forward(x), y, reduction="none"),
        )  # fmt: skip
        totals.append(total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)


def test_the_export_check_and_figures():
    """The smaller network is compared on the inputs that the larger one had."""
    pytest.importorskip("torch_pruning")
    model = net(Doubles, torch.float32).eval()
    with torch.no_grad():
        for tensor in (model[2].weight, model[2].bias):
            tensor[:6] = 0
    x = torch.randn(5, 1, 3, 4)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, cuts = shrink(model, x)
    assert [cut.after for cut in cuts if cut.after < cut.before] == [10]
    export.check("torch", small, model, x)
    pruning_figures(model, x)
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="the smaller model"):
        export.check("torch", net(Doubles, torch.float32), nn.Sequential(Doubles(), model), x)
