"""lora.csv against dense products of the clients' own factors, which a run's trajectory keeps."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from fedsparse import run
from fedsparse.federation.trajectory import read_row
from fedsparse.landscape.replay import load

FAST = ["model=vit_digits", "logger=csv", "pictures=false", "federation.rounds=2", "federation.num_clients=3"]
FAST += ["federation.clients_per_round=1.0", "federation.local_steps=3", "calibration.head_steps=1", "optimizer.lr=0.3"]
FAST += ["trajectory=global", "trajectory.clients=[0,1,2]", "partition=dirichlet01"]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def dense(tensors, layer):
    return 2 * tensors[f"{layer}.lora_B.default.weight"].double() @ tensors[f"{layer}.lora_A.default.weight"].double()


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_layer_has_the_distance_of_the_means_from_the_mean(tmp_path, devices):
    run([*FAST, "method=fedit", f"trainer.devices={devices}", f"hydra.run.dir={tmp_path}"])
    problem = load(tmp_path).assembly.problem
    weights = np.array([len(part) for part in problem.parts], dtype=float)
    weights /= weights.sum()
    found = rows_of(tmp_path / "lora.csv")
    layers = [name for name, _ in problem.net.named_modules() if name.endswith("qkv")]
    assert [(row["round"], row["group"], row["layer"]) for row in found] == [(r, "0", x) for r in "12" for x in layers]
    for row in found:
        closed, layer = int(row["round"]), row["layer"]
        files = [tmp_path / f"trajectory.client_{client}.safetensors" for client in range(3)]
        clients = [problem.space.unflatten(read_row(file, closed)) for file in files]
        ideal = sum(w * dense(tensors, layer) for w, tensors in zip(weights, clients, strict=True))
        middle = {
            name: sum(w * tensors[name].double() for w, tensors in zip(weights, clients, strict=True))
            for name in clients[0]
        }
        distance, size = (float(torch.linalg.matrix_norm(m)) for m in (ideal - dense(middle, layer), ideal))
        assert float(row["error"]) == pytest.approx(distance, rel=1e-4)
        assert float(row["relative_error"]) == pytest.approx(distance / size, rel=1e-4)
        assert float(row["norm"]) == pytest.approx(size, rel=1e-5)
        shares = torch.linalg.svdvals(ideal)
        shares = shares[shares > 0] / shares.sum()
        assert float(row["effective_rank"]) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4)
    metrics = rows_of(tmp_path / "metrics.csv")[-1]
    total = sum(float(row["error"]) ** 2 for row in found if row["round"] == "2") ** 0.5
    assert float(metrics["lora/error"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("method", ["fedsa", "ffa", "local"])
def test_where_one_factor_is_not_averaged_there_is_no_error(tmp_path, method):
    run([*FAST, f"method={method}", f"hydra.run.dir={tmp_path}"])
    assert rows_of(tmp_path / "lora.csv") == []
    assert "lora/error" not in rows_of(tmp_path / "metrics.csv")[-1]


def test_after_a_resume_no_round_is_there_twice(tmp_path):
    run([*FAST, "method=fedit", "federation.rounds=3", f"hydra.run.dir={tmp_path / 'whole'}"])
    run([*FAST, "method=fedit", f"hydra.run.dir={tmp_path / 'part'}"])
    run([f"resume={tmp_path / 'part'}", "federation.rounds=3"])
    assert rows_of(tmp_path / "part" / "lora.csv") == rows_of(tmp_path / "whole" / "lora.csv")


def test_after_one_round_every_layer_has_an_update(tmp_path):
    """With B = 0 at the start A's gradient is 0, and B moves first."""
    run([*FAST, "method=fedit", "federation.rounds=1", f"hydra.run.dir={tmp_path}"])
    assert all(float(row["norm"]) > 0 for row in rows_of(tmp_path / "lora.csv"))
