"""A run as a person makes it: what it returns, and what lies in its folder."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, log_loss

from fedsparse.data.datasets import digits
from fedsparse.job.keys import target_of
from fedsparse.masks import Mask
from fedsparse.models.vision import vit_digits
from fedsparse.simulation.csv_logger import read_rows

KEYS = {
    "test/acc", "test/loss", "test/acc_best", "val/acc", "client/acc_mean", "client/acc_worst10", "rounds",
    "num_parameters", "trainable_fraction", "bytes_up", "bytes_down", "bytes_dense", "bytes_setup_up",
    "bytes_setup_down", "bytes_total", "seconds", "seed", "mask_rule", "partition", "dropped_updates", "global_sha256",
}  # fmt: skip
FILES = {
    ".hydra/config.yaml", "run.log", "metrics.csv", "summary.json", "mask.safetensors", "model.safetensors",
    "partition.png", "curves.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
}  # fmt: skip


def test_the_run_folder_and_the_summary_are_complete(run_in):
    summary, folder = run_in("a", "mask_rule=random", "partition=noniid_nc1", "pictures=true")
    assert set(summary) >= KEYS
    assert json.loads((folder / "summary.json").read_text()) | {"folder": str(folder)} == summary
    assert all((folder / name).is_file() for name in FILES)
    assert (summary["mask_rule"], summary["partition"], summary["rounds"]) == ("random", "noniid_nc1", 3)
    assert [row["round"] for row in read_rows(folder / "metrics.csv")] == [1, 2, 3]
    assert not list(folder.rglob("*.part"))


def test_reported_figures_are_those_of_the_saved_model(run_in):
    summary, folder = run_in("a", "model=vit_digits", "mask_rule=random")
    net = vit_digits()
    net.load_state_dict(load_file(folder / "model.safetensors"))
    data = digits()
    with torch.no_grad():
        probabilities = {
            name: net.eval()(getattr(data, name).x).double().softmax(1).numpy() for name in ("val", "test")
        }
    for name, p in probabilities.items():
        y = getattr(data, name).y.numpy()
        assert summary[f"{name}/acc"] == pytest.approx(accuracy_score(y, p.argmax(1)), abs=1e-6)
        assert summary[f"{name}/loss"] == pytest.approx(log_loss(y, p, labels=np.arange(10)), abs=1e-5)
    assert summary["num_parameters"] == sum(p.numel() for p in net.parameters())
    rows = read_rows(folder / "metrics.csv")
    best = max(rows, key=lambda row: row["val/acc"])
    assert summary["test/acc_best"] == best["test/acc"]


def test_frozen_weights_of_the_saved_model_are_the_pretrained_ones(run_in):
    _, folder = run_in("a", "model=vit_digits", "mask_rule=random", "optimizer.weight_decay=0.01")
    masks, saved = Mask.load(folder / "mask.safetensors").tensors, load_file(folder / "model.safetensors")
    for name, pretrained in vit_digits(seed=0).state_dict().items():
        frozen = ~masks[name]
        assert torch.equal(saved[name][frozen].view(torch.int32), pretrained[frozen].view(torch.int32)), name
        assert masks[name].float().mean() < 0.35 or "head" in name or "norm" in name or name.endswith(("bias", "token"))


def test_bytes_at_sparsity_080(run_in):
    summary, folder = run_in("a", "model=vit_digits", "mask_rule=random", "federation.rounds=2")
    net = vit_digits()
    n = sum(p.numel() for p in net.parameters())
    head = sum(p.numel() for p in net.head.parameters())
    trained = head + math.floor(0.2 * (n - head) + 0.5)
    messages = 2 * 10
    assert summary["trainable_fraction"] == pytest.approx(trained / n, abs=1e-12)
    assert summary["bytes_dense"] == pytest.approx(messages * 4 * n, rel=1e-3)
    assert summary["bytes_up"] == pytest.approx(messages * 4 * trained, rel=1e-3)
    assert summary["bytes_up"] <= 0.21 * summary["bytes_dense"]
    assert summary["bytes_down"] == summary["bytes_up"]
    parts = ("bytes_up", "bytes_down", "bytes_setup_up", "bytes_setup_down")
    assert summary["bytes_total"] == sum(summary[part] for part in parts)


def test_the_same_command_twice_gives_the_same_bits(run_in):
    (first, _), (second, _) = (run_in(name, "mask_rule=least_sensitive") for name in "ab")
    assert first["global_sha256"] == second["global_sha256"]


def test_another_seed_gives_another_model(run_in):
    (first, _), (second, _) = (run_in(f"s{seed}", f"seed={seed}") for seed in (0, 1))
    assert first["global_sha256"] != second["global_sha256"]


def test_dense_equals_density_one(run_in):
    dense, _ = run_in("a", "mask_rule=dense")
    ones, _ = run_in("b", "mask_rule=random", "sparsity=s0")
    assert dense["global_sha256"] == ones["global_sha256"]
    assert dense["bytes_up"] == dense["bytes_dense"] == ones["bytes_up"]


def test_full_exchange_sends_what_does_not_train_and_changes_nothing_else(run_in):
    masked, _ = run_in("a", "mask_rule=random")
    full, _ = run_in("b", "mask_rule=random", "exchange=full")
    assert full["global_sha256"] == masked["global_sha256"]
    assert full["bytes_up"] == full["bytes_dense"]


def test_a_saved_mask_can_be_used_again(run_in):
    first, folder = run_in("a", "mask_rule=least_sensitive")
    again, _ = run_in("b", "mask_rule=from_file", f"mask_rule.path={folder / 'mask.safetensors'}")
    assert again["global_sha256"] == first["global_sha256"]


@pytest.mark.parametrize("where", ["clients", "server"])
def test_calibration_does_not_depend_on_the_cohort_size(run_in, where):
    options = ("mask_rule=most_sensitive", f"calibration.where={where}", "federation.rounds=1")
    (_, one), (_, five) = (run_in(f"k{k}", *options, f"federation.cohort={k}") for k in (1, 5))
    masks = [Mask.load(folder / "mask.safetensors") for folder in (one, five)]
    assert masks[0].overlap(masks[1]) == 1.0
    assert 0.2 < masks[0].density < 0.35


OPTIONS = [
    "server=fedavgm", "server=fedavgm_ema", "server=fedadam", "server=fedyogi", "server=fedadagrad",
    "federation.weight=equal", "sampling=everyone", "optimizer.nesterov=true",
    "schedule=cosine", "sparsity.unit=output", "sparsity.scope=tensor", "calibration.labels=model",
    "calibration.fisher=batch", "federation.clients_per_round=3", "optimizer.clip_norm=null", "partition=dirichlet",
    "partition=unbalanced", "partition=diri", "data.local_test=0.2",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_run(run_in, fast_run, option):
    other, _ = run_in("b", option)
    assert other["global_sha256"] != fast_run["global_sha256"]
    assert math.isfinite(other["test/loss"])


def test_evaluation_every_two_rounds_still_evaluates_the_last(run_in):
    summary, folder = run_in("a", "federation.eval_every=2")
    rows = read_rows(folder / "metrics.csv")
    assert [row["round"] for row in rows if "val/acc" in row] == [2, 3]
    assert summary["test/acc"] == rows[-1]["test/acc"]


def test_a_resolved_config_is_stored(run_in):
    _, folder = run_in("a", "optimizer.lr=0.07")
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert cfg.optimizer.lr == 0.07
    assert instantiate(target_of("optimizer", cfg.optimizer)).keywords["lr"] == 0.07


def test_early_stopping_is_lightnings_own(run_in):
    options = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=1e-9")
    summary, _ = run_in("a", *options, "federation.rounds=9")
    assert summary["rounds"] == 2


@pytest.mark.soak
@pytest.mark.slow
def test_cohort_sizes_agree_in_the_default_run(run_in):
    rows = []
    for k in (1, 3, 20):
        _, folder = run_in(f"k{k}", "logger=csv", f"federation.cohort={k}", fast=False)
        rows.append(torch.cat([t.flatten() for t in load_file(folder / "model.safetensors").values()]))
    for row in rows[1:]:
        assert float((row - rows[0]).abs().max()) < 1e-5
