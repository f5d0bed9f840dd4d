"""The scaled task vector, against interpolation by hand between the model as built and the model as saved."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import update_bn

from fedsparse import report
from fedsparse.data.datasets import digits
from fedsparse.landscape import scale
from fedsparse.models.vision import mlp


def by_hand(folder, alpha, split):
    start = mlp(64, 64, 10, seed=0).state_dict()
    end = load_file(folder / "model.safetensors")
    net = mlp(64, 64, 10, seed=1)
    net.load_state_dict({name: start[name] + alpha * (end[name] - start[name]) for name in start})
    return float((net(split.x).argmax(1) == split.y).double().mean())


def test_it_is_interpolation_between_start_and_end(run_in):
    summary, folder = run_in("a", "head.init=random", "mask_rule=random", "federation.rounds=2")
    facts = scale.scaled(folder)
    data = digits()
    assert facts["test/acc_at_1"] == pytest.approx(summary["test/acc"])
    for alpha, val in list(zip(facts["alphas"], facts["val"], strict=True))[::5]:
        assert val == pytest.approx(by_hand(folder, alpha, data.val))
    assert facts["val/acc"] == max(facts["val"])
    assert facts["test/acc"] == pytest.approx(by_hand(folder, facts["alpha"], data.test))


def test_the_start_has_the_prepared_head_and_zero_is_the_head_alone(run_in):
    _, folder = run_in("a", "head.init=closed_form", "mask_rule=random", "federation.rounds=1")
    facts = scale.scaled(folder)
    assert facts["val"][0] > 0.7  # ridge regression on random features, nothing trained


def test_the_report_measures_and_shows_it_once(run_in, tmp_path, capsys, monkeypatch):
    _, folder = run_in("runs/a", "mask_rule=random", "federation.rounds=1")
    report.main([str(tmp_path / "runs"), "--scale"])
    facts = json.loads((folder / "scale.json").read_text())
    assert f"{facts['alpha']:g}" in capsys.readouterr().out
    monkeypatch.setattr(scale, "scaled", lambda _: pytest.fail("measured again"))
    report.main([str(tmp_path / "runs"), "--scale"])


def test_batchnorm_is_computed_again_at_every_alpha_on_what_clients_hold(run_in):
    net = ["model=fednet", "federation.cohort=1", "head.init=random", "mask_rule=dense", "partition=iid"]
    _, folder = run_in("a", *net, "federation.rounds=1", "logger=csv", "pictures=false", fast=False)
    facts, data = scale.scaled(folder), digits()
    assembly, _ = scale.at_start(folder)
    net, held = assembly.problem.net, torch.from_numpy(np.concatenate(assembly.problem.parts))
    assert sorted(held.tolist()) == list(range(len(data.train.y)))
    few = replace(assembly.problem, parts=[np.array([3, 1]), np.array([]), np.array([1, 8])]).dealt
    assert torch.equal(few.x, data.train.x[[1, 3, 8]])
    assert torch.equal(few.y, data.train.y[[1, 3, 8]])
    start, end = {k: v.clone() for k, v in net.state_dict().items()}, load_file(folder / "model.safetensors")
    trained = [name for name, _ in net.named_parameters()]
    for alpha, val in list(zip(facts["alphas"], facts["val"], strict=True))[::3]:
        net.load_state_dict(end | {name: start[name] + alpha * (end[name] - start[name]) for name in trained})
        with torch.no_grad():
            update_bn(data.train.x.tensor_split(-(-len(held) // 256)), _without_dropout(net))
            right = (net.eval()(data.val.x).argmax(1) == data.val.y).double().sum()
        assert val * len(data.val.y) == pytest.approx(float(right), abs=1)  # sums in another order: one tie


def _without_dropout(net):
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return net


def test_what_is_not_finite_has_no_accuracy_and_is_not_chosen(run_in):
    _, folder = run_in("a", "mask_rule=random", "federation.rounds=1")
    end = load_file(folder / "model.safetensors")
    end["hidden.bias"][0] = float("nan")
    save_file(end, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no model on the way from the start to the end has a finite loss"):
        scale.scaled(folder)  # nor has the start: 0 times NaN is NaN
    assert scale.best_alpha([0.0, 0.5, 1.0], [0.2, 0.1, None]) == 0.0
    end["hidden.bias"][0] = 3e38  # overflows from some alpha on
    save_file(end, folder / "model.safetensors")
    facts = scale.scaled(folder)
    assert facts["val"][0] is not None
    assert facts["val"][-1] is None
    assert facts["val/acc"] == max(value for value in facts["val"] if value is not None)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_ties_go_to_the_alpha_nearest_to_one():
    assert scale.best_alpha([0.0, 0.8, 1.1, 1.5], [0.1, 0.9, 0.9, 0.9]) == 1.1
    assert torch.tensor(scale.ALPHAS).diff().allclose(torch.tensor(0.1))
