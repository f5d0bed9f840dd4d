"""What deviations measure: ranks by hand, and the Fisher information of a run's start against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from fedsparse.landscape.scale import at_start
from fedsparse.studies import correlations


def test_figures_by_hand():
    """Two tensors of three coordinates each, and one coordinate that never moved.

    Ranks of the deviation are 1 to 6. Those of the magnitude are 3 2 1 4 5 6: d^2 sums to 8, so that Spearman's is
    1 - 6 * 8 / 210; within the tensors it is -1 and 1. Those of Fisher are 1 2 3 4 6 5: 1 - 6 * 2 / 210; within, 1 and
    1 - 6 * 2 / 24 = 0.5.
    """
    deviation = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0])
    magnitude = np.array([0.3, 0.2, 0.1, 0.4, 0.5, 0.6, 9.0])
    fisher = np.array([1.0, 4.0, 9.0, 16.0, 36.0, 25.0, 0.0])
    found = correlations.figures(deviation, magnitude, fisher, np.array([0, 0, 0, 1, 1, 1, 1]))
    assert found["magnitude"] == pytest.approx(1 - 48 / 210)
    assert found["magnitude_within"] == pytest.approx(0)
    assert found["fisher"] == pytest.approx(1 - 12 / 210)
    assert found["fisher_within"] == pytest.approx(0.75)
    assert found["unmoved"] == pytest.approx(1 / 7)
    assert found["variation"] == pytest.approx((35 / 12) ** 0.5 / 3.5)  # variance of 1 to 6: 35 / 12
    assert found["ratio"] == pytest.approx(5.5 / 1.5)


def test_a_tensor_without_order_is_left_out_of_the_mean():
    ones = np.ones(3)
    found = correlations.figures(
        np.arange(1.0, 7.0), np.r_[ones, 3.0, 2.0, 1.0], np.ones(6), np.array([0, 0, 0, 1, 1, 1])
    )
    assert found["magnitude_within"] == pytest.approx(-1)
    assert np.isnan(found["fisher"])
    assert np.isnan(found["fisher_within"])


def test_a_folder_without_deviations_says_so(run_in, tmp_path):
    run_in("plain", "mask_rule=random", "pictures=false")
    with pytest.raises(SystemExit, match="no run holds guidance.safetensors; run with mask_rule=autoflip"):
        correlations.main([str(tmp_path / "plain")])


SMALL = ["experiment=autoflip_digits", "explore.save=true", "explore.steps=2", "logger=csv", "pictures=false"]


def test_a_run_saves_what_its_clients_explored_and_is_measured(run_in, tmp_path, capsys):
    _, folder = run_in("runs/one", *SMALL, "federation.rounds=1", fast=False)
    stored = load_file(folder / "guidance.safetensors")
    assert {name: tuple(part.shape) for name, part in stored.items()} == {
        "hidden.weight": (64, 64), "hidden.bias": (64,), "head.weight": (10, 64), "head.bias": (10,),
    }  # fmt: skip
    assert all((part >= 0).all() and part.any() for part in stored.values())
    capsys.readouterr()
    correlations.main([str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split("│")[1:-1] for line in lines if "mlp" in line]
    assert [cell.strip() for cell in row[:3]] == ["mlp", "noniid_nc2", "SGDM"]

    _, preparation = at_start(folder)
    net, train = preparation.net.eval(), preparation.dataset.train
    total = torch.zeros(preparation.space.size, dtype=torch.float64)
    for part in preparation.parts:
        for i in part:
            x, y = preparation.take(train, np.array([i]))
            grads = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
            total += torch.cat([grad.flatten() for grad in grads]).double() ** 2
    assert torch.allclose(correlations.fisher(preparation), total, rtol=1e-4, atol=1e-9)


def test_nothing_is_saved_unasked(run_in):
    _, folder = run_in("run", *SMALL, "explore.save=false", "federation.rounds=1", fast=False)
    assert not (folder / "guidance.safetensors").exists()
