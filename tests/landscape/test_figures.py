"""Figures of models from the command, against plain loops: losses, distances, noise, bound, path norm."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from landscapes import by_hand, drawn, global_row
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fedsparse.data.datasets import digits
from fedsparse.landscape.options import Options
from fedsparse.landscape.replay import load, local_row
from fedsparse.landscape.scene import Scene
from fedsparse.landscape.task import MeanLoss
from fedsparse.models.vision import mlp

pytestmark = pytest.mark.slow  # the file takes half a minute

FAST = ("surface=false", "data=[test]", "grid=3")


def test_models_have_their_losses_and_distances(folder):
    figures = drawn(folder, "surface=false", "data=[test]")
    models, test = load(folder), digits().test
    problem, train = models.assembly.problem, digits().train
    dealt = torch.from_numpy(np.concatenate(problem.parts))
    rows = {"global": global_row(folder), **{f"client {c}": local_row(models, c) for c in (0, 1)}}
    built = torch.cat([p.detach().flatten() for p in mlp(64, 64, 10, seed=0).parameters()])
    for name, row in rows.items():
        found = figures["models"]["models"][name]
        for data, x, y in (("test", test.x, test.y), ("train", train.x[dealt], train.y[dealt])):
            assert (found[data]["loss"], found[data]["accuracy"]) == pytest.approx(by_hand(row, x, y), rel=1e-5)
        assert found["from_start"] == pytest.approx(float((row - built).norm()), rel=1e-5)
    apart = figures["models"]["distances"]
    assert list(apart) == ["global to client 0", "global to client 1", "client 0 to client 1"]
    for pair, value in apart.items():
        one, other = (rows[name] for name in pair.split(" to "))
        assert value == pytest.approx(float((one - other).norm()), rel=1e-5)
    assert not list((folder / "landscape").glob("surface*"))


@pytest.mark.parametrize("of", ["accuracy", "loss"])
def test_sigma_is_where_fresh_noise_costs_the_target(folder, of):
    """300 perturbations that the bisection did not draw; of its own 30 the mean scatters by a few hundredths."""
    found = drawn(folder, "sharpness=true", f"sigma.of={of}", *FAST)["sharpness"]
    split, row = Scene.of(folder, Options()).split("train", 256), global_row(folder)
    here = by_hand(row, split.x, split.y)
    noise = torch.randn(300, len(row), generator=torch.Generator().manual_seed(8)) * found["sigma"]["value"]
    loss, accuracy = np.mean([by_hand(row + step, split.x, split.y) for step in noise], axis=0)
    rise = loss - here[0] if of == "loss" else here[1] - accuracy
    assert found["sigma"]["of"] == of
    assert rise == pytest.approx(0.1, abs=0.03)


def test_the_bound_is_that_of_the_error_under_the_noise(folder):
    figures = drawn(folder, "sharpness=true", *FAST)
    found, row = figures["sharpness"], global_row(folder)
    scene = Scene.of(folder, Options())
    train, sigma = scene.split("train", None), found["sigma"]["value"]
    noise = torch.randn(300, len(row), generator=torch.Generator().manual_seed(9)) * sigma
    error = 1 - np.mean([by_hand(row + step, train.x, train.y)[1] for step in noise])
    bound = found["pac_bayes"]
    assert bound["train_error"] == pytest.approx(error, abs=0.03)
    assert bound["samples"] == len(train.y) > 1000
    distance2 = figures["models"]["models"]["global"]["from_start"] ** 2
    inside = distance2 / (2 * sigma**2) + math.log(2 * math.sqrt(len(train.y)) * 2**20 / 0.05)
    assert bound["bound"] == pytest.approx(bound["train_error"] + math.sqrt(inside / (2 * len(train.y))), rel=1e-6)


def test_without_noise_on_what_training_moved_there_is_no_bound(folder):
    assert drawn(folder, "sharpness=true", "mask=outside", *FAST)["sharpness"]["pac_bayes"]["bound"] is None


def test_the_path_norm_is_that_of_squared_weights(folder):
    found = drawn(folder, "sharpness=true", *FAST)["sharpness"]["path_norm"]
    names = [name for name, _ in mlp(64, 64, 10, seed=0).named_parameters()]
    assert [name.split(".")[-1] for name in names] == ["weight", "bias"] * 2
    w1, b1, w2, b2 = (part.double().numpy() ** 2 for part in global_row(folder).split([64 * 64, 64, 640, 10]))
    hidden = w1.reshape(64, 64).sum(1) + b1
    assert found == {"value": pytest.approx(math.sqrt((w2.reshape(10, 64) @ hidden + b2).sum())), "why": None}


def test_figures_of_earlier_calls_are_kept_while_the_models_are_the_same(folder):
    first = drawn(folder, "curvature=true", *FAST)
    second = drawn(folder, "sharpness=true", *FAST)
    kept = json.loads((folder / "landscape" / "landscape.json").read_text())
    assert "curvature" not in second
    assert kept["curvature"] == first["curvature"]
    assert kept["sharpness"] == second["sharpness"]
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    drawn(folder, "models=[global]", *FAST)
    assert "curvature" not in json.loads((folder / "landscape" / "landscape.json").read_text())


def test_the_hessian_is_taken_in_batches_that_fit(folder):
    """A sample adds 64 inputs and 64 hidden values, 512 bytes, at least; and no more than ten times the hidden ones."""
    scene = Scene.of(folder, Options())
    split, row = scene.split("train", 100), scene.row("global")
    loss, together = MeanLoss(scene.task, split).fitted(row)
    assert (loss.batch, together) == (64, True)
    few, together = MeanLoss(scene.task, split).fitted(row, room=20_000)
    assert 20_000 // 2560 <= few.batch <= 20_000 // 512
    assert not together
    least, _ = MeanLoss(scene.task, split).fitted(row, room=1)
    assert least.batch == 1
    vectors = torch.randn(2, len(row), generator=torch.Generator().manual_seed(0))
    wanted = loss.hessian(row)(vectors)
    torch.testing.assert_close(few.hessian(row)(vectors), wanted, rtol=1e-4, atol=1e-6)
    mean = np.mean([float(cross_entropy(scene.task.load(row)(x), y)) for x, y in scene.task.batches(split, 1)])
    assert few(row) == pytest.approx(mean, rel=1e-5)
