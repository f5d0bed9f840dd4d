"""The scaled task vector, against interpolation by hand between the model as built and the model as saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

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


def test_ties_go_to_the_alpha_nearest_to_one():
    assert scale.best_alpha([0.0, 0.8, 1.1, 1.5], [0.1, 0.9, 0.9, 0.9]) == 1.1
    assert torch.tensor(scale.ALPHAS).diff().allclose(torch.tensor(0.1))
