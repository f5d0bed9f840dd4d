"""Rows on a split against a plain loop over load_state_dict, and what evaluation leaves alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Split
from fedsparse.federation.client.training import Clients
from fedsparse.federation.federation import Federation
from fedsparse.landscape import MeanLoss, Plane, Task, evaluate, evaluate_plane, evaluate_rows
from fedsparse.landscape.surface import chunk_size, joined
from fedsparse.models.units import compute_all_units
from fedsparse.models.vision import mlp, vit_digits
from fedsparse.optim import SparseSGDM
from fedsparse.simulation.evaluation import Evaluation


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


def of_images(samples, side=8, classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Split(torch.randn(samples, 1, side, side, generator=g), torch.randint(classes, (samples,), generator=g))


def rows_around(net, count, size=0.3, seed=1):
    space = ParamSpace.of(net)
    row = space.read(net)
    noise = torch.randn(count, space.size, generator=torch.Generator().manual_seed(seed)).to(row)
    return row + size * row.std() * noise


@torch.no_grad()
def by_state_dicts(net, rows, split, training=None):
    """Each model by itself, whole split at once: losses and accuracies in plain float64."""
    net, found = copy.deepcopy(net), []
    names = [name for name, _ in net.named_parameters()]
    for row in rows:
        parts = row.split([net.get_parameter(n).numel() for n in names])
        weights = {n: part.view_as(net.get_parameter(n)) for n, part in zip(names, parts, strict=True)}
        net.load_state_dict(net.state_dict() | weights)
        if training is not None:
            update_bn(training.x.tensor_split(-(-len(training.y) // 256)), net)
        logits = net.eval()(split.x)
        right = (logits.argmax(1) == split.y).double().mean()
        found.append([float(cross_entropy(logits.double(), split.y)), float(right)])
    return torch.tensor(found, dtype=torch.float64).T


NETS = {
    "mlp": lambda: mlp(64, 16, 10),
    "vit": lambda: vit_digits(10),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10)
    ),
}


SIZES = {"samples": 13, "stacked": 40}  # of 30 samples: batches of 10; of 3 points batches of 10 too, of 2 points 15


@pytest.mark.parametrize("form", ["stacked", "single", "fastest"])
@pytest.mark.parametrize("name", list(NETS))
def test_rows_are_evaluated_as_each_model_by_itself(name, form):
    net = NETS[name]().train()
    rows, split = rows_around(net, 5), of_images(30)
    task = Task(net, ParamSpace.of(net), losses, per_sample=True)
    assert chunk_size(task, 3) == 3
    found = joined(evaluate(task, rows.split(3), split, form, **SIZES))
    loss, accuracy = by_state_dicts(net, rows, split)
    torch.testing.assert_close(found.loss, loss, rtol=2e-6, atol=0)
    assert torch.equal(found.accuracy, (accuracy * 30).round() / 30)
    assert loss.max() - loss.min() > 1e-3
    assert found.loss.dtype == torch.float64


class Noted:
    """Inputs as they are, and the sizes of their batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x):
        self.sizes.append(len(x))
        return x


def federation(net, **options):
    space = ParamSpace.of(net)

    def make(parts):
        return SparseSGDM(parts, lr=0.1)

    mask = torch.ones(space.size, dtype=torch.bool) if (given := options.pop("mask", None)) is None else given
    clients = Clients(net, space, mask, make, losses, lambda cohort: None, **options)
    return Federation(clients)


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("single", [10] * 3 * 5), ("stacked", [2] + [10] * 3 + [15] * 2)],  # stacking is tried on two samples
)
def test_rows_are_evaluated_in_chunks_and_batches_of_the_sizes_given(form, sizes):
    net, noted = NETS["mlp"](), Noted()
    whole, rows, split = federation(net, per_sample=True, inputs=noted), rows_around(net, 5), of_images(30)
    found = evaluate_rows(whole, rows, split, form=form, points=3, **SIZES)
    assert noted.sizes == sizes
    torch.testing.assert_close(found.loss, by_state_dicts(net, rows, split)[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("form", ["stacked", "single"])
def test_chunks_batches_and_cohorts_change_nothing_beyond_rounding(form):
    net, split = NETS["conv"](), of_images(30)
    rows = rows_around(net, 7)
    expected = evaluate_rows(federation(net, per_sample=True), rows, split, form=form)
    for cohort, points, samples, stacked in ((1, 1, 500, 3000), (3, 2, 7, 5), (2, 5, 30, 90), (1, 7, 1, 1)):
        options = {"points": points, "samples": samples, "stacked": stacked}
        found = evaluate_rows(federation(net, cohort=cohort, per_sample=True), rows, split, form=form, **options)
        torch.testing.assert_close(found.loss, expected.loss, rtol=2e-6, atol=0)
        assert torch.equal(found.accuracy, expected.accuracy)


@pytest.mark.parametrize("size", ["points", "samples", "stacked"])
def test_a_size_of_nothing_is_refused(size):
    net = NETS["mlp"]()
    with pytest.raises(ValueError, match=f"{size} is 0; it must be"):
        evaluate_rows(federation(net), rows_around(net, 1), of_images(3), **{size: 0})


@pytest.mark.parametrize("cohort", [1, 3])
def test_the_federations_network_keeps_everything(cohort):
    net = NETS["conv"]().train()
    net[2].eval()
    space = ParamSpace.of(net)
    mask = space.where("5.bias")
    space.unflatten(mask)["5.weight"][3:] = True  # whole units: the layer gets a backward of its own
    # the last layer's weight is a block of its own
    whole = federation(net, mask=mask, cohort=cohort, per_sample=True, large=1000)
    parameters, modes = dict(net.named_parameters()), [m.training for m in net.modules()]
    before, grads = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    forwards, random = [m.__dict__.get("forward") for m in net.modules()], torch.get_rng_state()
    assert any(forwards) == (cohort == 1)
    split, rows = of_images(12), rows_around(net, 4)
    found = {form: evaluate_rows(whole, rows, split, form=form) for form in ("stacked", "single")}
    torch.testing.assert_close(found["stacked"].loss, found["single"].loss, rtol=1e-5, atol=0)
    inside = MeanLoss(Task.of(whole.clients), split, mask)
    plain = copy.deepcopy(net).eval()
    for name, p in plain.named_parameters():
        p.requires_grad_(name.startswith("5."))
    compute_all_units(plain)
    cross_entropy(plain(split.x), split.y).backward()
    expected = torch.cat([p.grad.flatten() if p.grad is not None else 0 * p.flatten() for p in plain.parameters()])
    torch.testing.assert_close(
        inside.gradient(space.read(net)).float(), (expected * mask).detach(), rtol=1e-4, atol=1e-7
    )
    assert inside.hessian(space.read(net))(torch.ones(1, int(mask.sum()))).abs().max() > 0
    loss, accuracy = found["single"]
    torch.testing.assert_close(loss, by_state_dicts(net, rows, split)[0], rtol=2e-6, atol=0)
    assert len(accuracy) == 4
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert forwards == [m.__dict__.get("forward") for m in net.modules()]
    assert grads == [p.requires_grad for p in net.parameters()]
    assert all(parameters[name] is p for name, p in net.named_parameters())
    assert torch.equal(random, torch.get_rng_state())


class Draws(nn.Module):
    """A layer that draws in eval mode too."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def test_a_network_that_draws_in_eval_mode_leaves_the_random_state_alone():
    net = nn.Sequential(nn.Flatten(), Draws(), nn.Linear(64, 10))
    task, before = Task(net, ParamSpace.of(net), losses, per_sample=True), torch.get_rng_state()
    for form in ("single", "fastest"):
        joined(evaluate(task, [rows_around(net, 2)], of_images(5), form))
    assert torch.equal(before, torch.get_rng_state())


def with_batchnorm():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)
    )


def test_batchnorm_is_computed_again_at_every_point_on_training_data():
    net, training, split = with_batchnorm(), of_images(500, seed=4), of_images(50)
    whole, rows = federation(net), rows_around(net, 3, 1.0)
    before = copy.deepcopy(net.state_dict())
    found = evaluate_rows(whole, rows, split, training)
    torch.testing.assert_close(found.loss, by_state_dicts(net, rows, split, training)[0], rtol=1e-5, atol=0)
    assert (found.loss / by_state_dicts(net, rows, split)[0] - 1).abs().min() > 0.01  # with statistics as they are
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[1].momentum == 0.3
    more = of_images(600, seed=4)  # three batches of 200, where two of 300 would be too large
    torch.testing.assert_close(
        evaluate_rows(whole, rows, split, more).loss, by_state_dicts(net, rows, split, more)[0], rtol=1e-6, atol=0
    )
    again = evaluate_rows(whole, rows.flip(0), split, training)
    assert torch.equal(again.loss.flip(0), found.loss)  # no point sees the one before


def test_batchnorm_is_never_stacked_and_needs_training_samples():
    net = with_batchnorm()
    task = Task(net, ParamSpace.of(net), losses, per_sample=True, training=of_images(20))
    with pytest.raises(ValueError, match="form=stacked does not go with this model"):
        list(evaluate(task, [rows_around(net, 2)], of_images(5), "stacked"))
    with pytest.raises(ValueError, match="BatchNorm: its statistics need training samples"):
        evaluate_rows(federation(net), rows_around(net, 2), of_images(5))
    with pytest.raises(ValueError, match="BatchNorm: its statistics need training samples"):
        evaluate_rows(federation(net), rows_around(net, 2), of_images(5), training=of_images(0))


def test_an_uneven_training_split_makes_no_batch_of_one():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))  # which refuses to train on one sample
    found = evaluate_rows(federation(net), rows_around(net, 1), of_images(5), of_images(257))
    assert found.gaps == 0


def test_a_loss_of_ones_own_is_not_stacked():
    def contrast(forward, x, y):  # looks at the whole batch
        per_sample = cross_entropy(forward(x), y, reduction="none")
        return per_sample + per_sample.std()

    net, split = mlp(64, 16, 10), of_images(30)
    task, rows = Task(net, ParamSpace.of(net), contrast), rows_around(net, 3)
    found = joined(evaluate(task, [rows], split))
    space = ParamSpace.of(net)
    for k, row in enumerate(rows):
        space.write(net, row)
        assert float(found.loss[k]) == pytest.approx(float(contrast(net, split.x, split.y).detach().mean()), rel=1e-5)
    with pytest.raises(ValueError, match="form=stacked does not go"):
        list(evaluate(task, [rows], split, "stacked"))


@pytest.mark.parametrize("form", ["stacked", "single"])
def test_points_that_are_not_finite_are_gaps_and_the_others_stay(form):
    net, split = mlp(64, 16, 10), of_images(30)
    rows = rows_around(net, 5)
    rows[1, 3] = math.nan
    rows[2] *= 1e30  # overflows
    rows[4, -1] = -math.inf  # a class that is never chosen: the loss may be finite, the model is not
    found = evaluate_rows(federation(net, per_sample=True), rows, split, form=form)
    assert found.loss.isnan().tolist() == [False, True, True, False, True]
    assert found.accuracy.isnan().tolist() == [False, True, True, False, True]
    assert found.gaps == 3
    torch.testing.assert_close(found.loss[[0, 3]], by_state_dicts(net, rows[[0, 3]], split)[0], rtol=1e-6, atol=0)
    few = Split(split.x[split.y < 9], split.y[split.y < 9])  # nobody has the last class: the loss stays finite
    unused = copy.deepcopy(net)
    unused.head.bias.data[-1] = -math.inf
    assert cross_entropy(unused(few.x), few.y).isfinite()
    found = evaluate_rows(federation(net, per_sample=True), rows[3:], few, form=form)
    assert found.loss.isnan().tolist() == [False, True]


def test_a_surface_is_its_points_chunk_by_chunk():
    net, split = mlp(64, 16, 10), of_images(30)
    space = ParamSpace.of(net)
    plane = Plane.random(space.read(net), space, torch.Generator().manual_seed(0))
    a, b = torch.linspace(-1, 1, 7), torch.linspace(0, 1, 7)
    task = Task(net, space, losses, per_sample=True)
    chunks = list(evaluate_plane(task, plane, a, b, split, "single", points=3))
    assert [len(chunk.loss) for chunk in chunks] == [3, 3, 1]
    expected = by_state_dicts(net, plane.point(a, b), split)[0]
    torch.testing.assert_close(joined(chunks).loss, expected, rtol=1e-6, atol=0)


def test_as_many_coordinates_of_one_axis_as_of_the_other():
    net, split = mlp(64, 16, 10), of_images(30)
    space = ParamSpace.of(net)
    plane = Plane.random(space.read(net), space, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="shorter"):
        list(evaluate_plane(Task(net, space, losses), plane, torch.ones(6), torch.ones(3), split, points=3))


def test_a_chunk_holds_16_points_or_as_many_as_fit_into_128_mib():
    def task(*shape):
        net = nn.Linear(*shape, bias=False, device="meta")
        return Task(net, ParamSpace.of(net), losses)

    assert chunk_size(task(64, 10)) == 16
    assert chunk_size(task(64, 10), 1) == 1
    assert chunk_size(task(2048, 2048)) == 8  # of 16 MiB each
    assert chunk_size(task(8192, 8192)) == 1  # of 256 MiB


@pytest.mark.parametrize(
    ("form", "points", "samples", "sizes"),
    [
        ("single", 1, 1000, [500] * 2),
        ("single", 1, 1001, [333, 334, 334]),
        ("stacked", 1, 3000, [3000]),
        ("stacked", 1, 3001, [1500, 1501]),
        ("stacked", 3, 1000, [1000]),
    ],
)
def test_batches_hold_500_samples_of_a_point_or_3000_of_a_stack(form, points, samples, sizes):
    net, noted = mlp(64, 16, 10), Noted()
    task = Task(net, ParamSpace.of(net), losses, inputs=noted, per_sample=True)
    list(evaluate(task, [rows_around(net, points)], of_images(samples), form))
    assert sorted(noted.sizes[form == "stacked" :]) == sizes  # stacking is tried on two samples


def test_a_chunk_of_one_point_is_not_evaluated_twice():
    net, split, noted = mlp(64, 16, 10), of_images(30), Noted()
    task = Task(net, ParamSpace.of(net), losses, inputs=noted, per_sample=True)
    list(evaluate(task, rows_around(net, 3).split(1), split))
    assert noted.sizes == [2, 30, 30, 30]


def test_a_stack_of_more_points_than_it_may_hold_has_one_sample_of_each():
    net, split, noted = mlp(64, 16, 10), of_images(4), Noted()
    task, rows = Task(net, ParamSpace.of(net), losses, inputs=noted, per_sample=True), rows_around(net, 3)
    found = joined(evaluate(task, [rows], split, "stacked", stacked=1))
    assert noted.sizes == [2, 1, 1, 1, 1]
    torch.testing.assert_close(found.loss, by_state_dicts(net, rows, split)[0], rtol=2e-6, atol=0)


def test_a_network_of_one_tensor_without_batchnorm_makes_no_use_of_training_samples():
    torch.manual_seed(0)
    net, noted = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), Noted()
    task = Task(net, ParamSpace.of(net), losses, inputs=noted, training=of_images(40))
    rows, split = rows_around(net, 2), of_images(30)
    found = joined(evaluate(task, [rows], split))
    torch.testing.assert_close(found.loss, by_state_dicts(net, rows, split)[0], rtol=2e-6, atol=0)
    assert noted.sizes == [30, 30]


def test_frozen_parameters_stay_the_networks_own():
    net, split = mlp(64, 16, 10), of_images(30)
    space = ParamSpace.of(net, trainable=lambda name: name.startswith("head"))
    rows = torch.zeros(2, space.size)
    found = joined(evaluate(Task(net, space, losses, per_sample=True), [rows], split, "stacked"))
    torch.testing.assert_close(found.loss, torch.full((2,), math.log(10), dtype=torch.float64), rtol=1e-6, atol=0)
    rows += space.read(net)
    found = joined(evaluate(Task(net, space, losses, per_sample=True), [rows], split, "stacked"))
    assert found.loss.tolist() == pytest.approx([float(cross_entropy(net(split.x), split.y).detach())] * 2, rel=1e-6)


@pytest.mark.parametrize("cohort", [1, 2])
def test_the_value_of_a_trained_model_is_its_evaluation(cohort, tmp_path):
    small = Small(small_net(torch.float32), small_data(dtype=torch.float32), uneven_parts(), cohort=cohort)
    evaluation = Evaluation()
    small.callbacks.append(evaluation)
    small.fit(2, tmp_path)
    row = small.space.read(small.net)
    for name, split in (("val", small.dataset.val), ("test", small.dataset.test)):
        loss, accuracy = evaluate_rows(small.federation, row.unsqueeze(0), split)
        assert float(loss) == pytest.approx(evaluation.figures[f"{name}/loss"], rel=1e-6)
        assert float(accuracy) == pytest.approx(evaluation.figures[f"{name}/acc"], rel=1e-6)


def test_no_samples_and_unknown_forms_are_refused():
    net = mlp(64, 16, 10)
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate_rows(federation(net), rows_around(net, 1), of_images(0))
    with pytest.raises(ValueError, match="form is 'vmap'; it must be fastest, stacked or single"):
        evaluate_rows(federation(net), rows_around(net, 1), of_images(3), form="vmap")


def test_the_faster_form_is_kept(monkeypatch):
    net, split, noted = mlp(64, 16, 10), of_images(4), Noted()
    task = Task(net, ParamSpace.of(net), losses, inputs=noted, per_sample=True)
    clock = iter([0.0, 2.0, 2.0, 3.0, 10.0, 11.0, 11.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    asked, single, together = [2], [1] * 8, [4]  # batches of: two samples once; 2 points of 4 samples; all at once
    sizes = {"samples": 1, "stacked": 8}
    list(evaluate(task, rows_around(net, 6).split(2), split, **sizes))
    assert noted.sizes == asked + single + together + together + together
    noted.sizes.clear()
    list(evaluate(task, rows_around(net, 6).split(2), split, **sizes))
    assert noted.sizes == asked + single + together + single + single


def test_rows_may_be_stored_in_half_precision():
    net, split = mlp(64, 16, 10), of_images(30)
    task, rows = Task(net, ParamSpace.of(net), losses, per_sample=True), rows_around(net, 3).half()
    expected = by_state_dicts(net, rows.float(), split)[0]
    for form in ("stacked", "single"):
        torch.testing.assert_close(joined(evaluate(task, [rows], split, form)).loss, expected, rtol=1e-6, atol=0)
    loss = MeanLoss(task, split)
    assert loss(rows[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    assert torch.equal(loss.gradient(rows[0]), loss.gradient(rows[0].float()))
    vectors = torch.ones(1, task.space.size)
    assert torch.equal(loss.hessian(rows[0])(vectors), loss.hessian(rows[0].float())(vectors))
