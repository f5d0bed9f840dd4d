"""Landscapes of sequences: means over all answer tokens, or over samples, by plain loops over torch's own loss."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from languages import qwen2, sequences
from torch.nn import functional as F

from fedsparse.core.space import ParamSpace
from fedsparse.core.targets import IGNORED, count, cross_entropy
from fedsparse.data.datasets import Split
from fedsparse.federation.client.training import Clients
from fedsparse.federation.federation import Federation
from fedsparse.landscape import MeanLoss, Task, evaluate, evaluate_rows, joined, mean_rise, sam
from fedsparse.models.language import LanguageModel
from fedsparse.optim import SparseSGDM

pytest.importorskip("transformers", reason="transformers is in the extra text")
PER = {"token": count, "sample": None}


def losses(forward, x, y):
    return cross_entropy(forward(x), y)


@pytest.fixture(scope="module")
def net():
    shape = {"num_hidden_layers": 1, "vocab_size": 12, "hidden_size": 8, "intermediate_size": 8}
    return LanguageModel(qwen2(**shape, attn_implementation="eager")).double()


@pytest.fixture(scope="module")
def split():
    """Thirteen sequences with one to several targets, and one without."""
    x, y = sequences(14, words=12)
    y[4] = IGNORED
    assert count(y).unique().numel() > 4
    return Split(x, y)


def space_of(net):
    """Its linear layers, which have a stacked form."""
    return ParamSpace.of(net, lambda name: "proj" in name)


def by_hand(net, split, per):
    """The mean over the tokens of the whole split at once, or over samples one by one, where that without one is 0."""
    if per == "token":
        return F.cross_entropy(net(split.x).flatten(0, 1), split.y.flatten(), ignore_index=IGNORED)
    means = [
        F.cross_entropy(net(x.unsqueeze(0))[0], y, ignore_index=IGNORED)
        for x, y in zip(split.x, split.y, strict=True)
        if bool((y != IGNORED).any())
    ]
    return sum(means) / len(split.y)


def at(net, space, row):
    there = copy.deepcopy(net)
    space.write(there, row)
    return there


def rows_of(net, models=3):
    row = space_of(net).read(net).detach()
    noise = torch.randn(models, len(row), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return row + 0.1 * noise


@pytest.mark.parametrize("form", ["single", "stacked"])
@pytest.mark.parametrize("per", PER)
def test_losses_of_rows_are_those_of_the_whole_split(net, split, per, form):
    space, rows = space_of(net), rows_of(net)
    task = Task(net, space, losses, per_sample=True, weigh=PER[per])
    found = joined(evaluate(task, [rows[:2], rows[2:]], split, form, samples=3, stacked=6))
    models = [at(net, space, row) for row in rows]
    expected = torch.stack([by_hand(model, split, per) for model in models]).detach()
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    other = torch.stack([by_hand(model, split, next(p for p in PER if p != per)) for model in models]).detach()
    assert (found.loss - other).abs().min() > 1e-2
    right = torch.stack([((m(split.x).argmax(-1) == split.y) | (split.y == IGNORED)).all(1) for m in models])
    assert torch.equal(found.accuracy, right.double().mean(1))  # exact match of samples, whatever a loss is over


@pytest.mark.parametrize("per", PER)
def test_the_mean_loss_its_gradient_and_hessian_are_plain_autograds(net, split, per):
    space, row = space_of(net), rows_of(net, 1)[0]
    loss, there = MeanLoss(Task(net, space, losses, weigh=PER[per]), split, batch=4), at(net, space, row)
    expected, parameters = by_hand(there.requires_grad_(), split, per), [there.get_parameter(n) for n in space.names]
    slopes = torch.autograd.grad(expected, parameters, create_graph=True)
    gradient = torch.cat([slope.flatten() for slope in slopes])
    assert loss(row) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(loss.gradient(row), gradient.detach(), rtol=1e-9, atol=1e-12)
    vector = torch.randn(space.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    product = torch.cat([part.flatten() for part in torch.autograd.grad(gradient @ vector, parameters)])
    torch.testing.assert_close(loss.hessian(row)(vector.unsqueeze(0))[0], product, rtol=1e-8, atol=1e-10)


def test_sharpness_is_of_the_same_mean(net, split):
    space, row = space_of(net), rows_of(net, 1)[0]
    task = Task(net, space, losses, per_sample=True, weigh=count)
    loss, there = MeanLoss(task, split), at(net, space, row)
    by_hand(there.requires_grad_(), split, "token").backward()
    slope = torch.cat([there.get_parameter(name).grad.flatten() for name in space.names])

    def of(point):
        return float(by_hand(at(net, space, point), split, "token").detach())

    found = sam(loss, row, 0.05)
    assert found.first_order == pytest.approx(0.05 * float(slope.norm()), rel=1e-9)
    assert found.rise == pytest.approx(of(row + 0.05 * slope / slope.norm()) - of(row), rel=1e-7)
    token, sample = (
        mean_rise(Task(net, space, losses, weigh=w), row, split, torch.Generator().manual_seed(3), draws=2)
        for w in (count, None)
    )
    assert token != sample


@pytest.mark.parametrize("per", PER)
def test_a_task_of_clients_weighs_as_they_train(net, split, per):
    space, weigh = space_of(net), PER[per]
    mask, make = torch.ones(space.size, dtype=torch.bool), partial(SparseSGDM, lr=0.1)
    clients = Clients(net, space, mask, make, losses, lambda cohort: None, weigh=weigh)
    found = evaluate_rows(Federation(clients), rows_of(net, 1), split, form="single")
    expected = by_hand(at(net, space, rows_of(net, 1)[0]), split, per).detach()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-12)


def test_a_split_without_targets_has_loss_0(net, split):
    task = Task(net, space_of(net), losses, weigh=count)
    bare = Split(split.x[4:5], split.y[4:5])
    assert MeanLoss(task, bare)(rows_of(net, 1)[0]) == 0.0
    assert float(joined(evaluate(task, [rows_of(net, 1)], bare)).loss) == 0.0
