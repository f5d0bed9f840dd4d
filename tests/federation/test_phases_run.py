"""Phases as a person runs them: what is written, what it cost, and the phase that comes last."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from safetensors.torch import load_file

from fedsparse import calibrate, weights
from fedsparse.core.seeding import Purpose
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.federation.server.sampling import uniform
from fedsparse.masks import Mask
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.csv_logger import read_rows

FAST = ["model=mlp", "logger=csv", "pictures=false", "calibration.cache=null", "federation.num_clients=6"]
SIZE = 64 * 64 + 64 + 64 * 10 + 10  # of the MLP
HEAD = 64 * 10 + 10
KEPT = math.floor(0.2 * (64 * 64 + 64) + 0.5) + HEAD
HEADER = 48
MASK = HEADER + math.ceil(SIZE / 8)  # as a message


def traffic(folder):
    with (folder / "traffic.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("mode", ["freeze", "prune"])
def test_an_exploration_is_counted_and_shown(run_in, mode, capsys):
    """4 of 6 clients learn, 3 explore for 5 steps; 2 head steps of 3 clients."""
    options = [
        *FAST,
        *("mask_rule=autoflip", f"sparsity.mode={mode}", "federation.rounds=2", "federation.clients_per_round=4"),
        *("explore.clients=3", "explore.steps=5", "calibration.head_steps=2", "federation.local_steps=3"),
    ]
    summary, folder = run_in("run", *options, fast=False)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in said if "loss" in line] == ["explore 1/1", "round 1/2", "round 2/2"]
    log = (folder / "run.log").read_text()
    assert all(
        text in log for text in ("INFO head: ", "INFO explore 1/1  loss", "INFO round 2/2  loss", "density hidden")
    )
    rows = read_rows(folder / "metrics.csv")
    assert [row["phase"] for row in rows] == [0, 1, 1]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert [row["client_steps"] for row in rows] == [2 * 4 + 3 * 5, 2 * 4 + 15 + 12, 2 * 4 + 15 + 24]
    assert summary["client_steps"] == 47
    sent = traffic(folder)
    explore = [row for row in sent if row["round"] == 1]
    learn = [row for row in sent if row["round"] > 1]
    assert (len(explore), len(learn)) == (3, 8)
    assert {(r["up_header"], r["up_positions"], r["up_values"]) for r in explore} == {(HEADER, 0, 4 * SIZE)}
    assert {(r["up_header"], r["up_positions"], r["up_values"]) for r in learn} == {(HEADER, 0, 4 * KEPT)}
    head = 2 * 4 * (HEADER + 4 * HEAD)
    assert summary["bytes_setup_up"] == head + 3 * (HEADER + 4 * SIZE)
    assert summary["bytes_up"] == 8 * (HEADER + 4 * KEPT)
    first = HEADER + 4 * SIZE
    pruned = first - 4 * (SIZE - KEPT) if mode == "prune" else first
    have = {c for step in range(2) for c in uniform(step, eligible=range(6), count=4, seed=0, purpose=Purpose.HEAD)}
    early, masked = len(have) * first, set()
    for row in sent:
        model = 0 if row["client"] in have else first if row["round"] == 1 else pruned
        mask = 0 if row["round"] == 1 or row["client"] in masked else MASK
        assert row["first_contact"] == model + mask
        have.add(row["client"])
        masked |= {row["client"]} if mask else set()
    assert masked == {row["client"] for row in learn}
    down = sum(r["down_header"] + r["down_positions"] + r["down_values"] for r in explore)
    assert summary["bytes_setup_down"] == head + early + down + sum(row["first_contact"] for row in sent)
    mask = Mask.load(folder / "mask.safetensors")
    assert int(sum(t.sum() for t in mask.tensors.values())) == KEPT
    assert mask.metadata["rule"] == "autoflip"
    assert summary["sparsity"] == 0.8


def test_without_a_second_phase_there_is_no_column(run_in):
    _, folder = run_in("run", *FAST, "mask_rule=random", "federation.rounds=1", fast=False)
    assert "phase" not in read_rows(folder / "metrics.csv")[0]


def test_head_and_calibration_take_the_rounds_of_their_phase(run_in):
    shared = [*FAST, "mask_rule=least_sensitive", "federation.rounds=1"]
    one, _ = run_in("one", *shared, "calibration.head_steps=3", "calibration.rounds=2", fast=False)
    two, _ = run_in("two", *shared, "phases.head.rounds=3", "phases.calibrate.rounds=2", fast=False)
    assert one["client_steps"] == two["client_steps"]
    assert one["global_sha256"] == two["global_sha256"]
    assert len(two["mask_overlap_rounds"]) == 1
    none, _ = run_in("none", *FAST, "mask_rule=random", "federation.rounds=1", "phases.head=null", fast=False)
    assert none["client_steps"] == 3 * 4


def test_fine_tuning_has_a_rate_of_its_own_and_the_mask_stays(run_in, monkeypatch):
    masks, end = [], FederatedRounds.on_train_batch_end

    def spy(self, trainer, module, *args):
        if trainer.is_last_batch:
            rate = module.clients.optimizer.param_groups[0]["lr"]
            masks.append((self.phase.name, torch.as_tensor(module.mask).clone(), rate))
        end(self, trainer, module, *args)

    monkeypatch.setattr(FederatedRounds, "on_train_batch_end", spy)
    options = [
        *FAST,
        *("mask_rule=random", "phases=fine_tune", "phases.fine_tune.rounds=3", "phases.fine_tune.lr=0.02"),
        *("federation.rounds=4", "sparsity.renew_every=2", "sparsity=gradual80", "sparsity.schedule.steps=6"),
        *("schedule=cosine", "sparsity.mode=prune", "optimizer.lr=0.1"),
    ]
    _, folder = run_in("run", *options, fast=False)
    assert [name for name, *_ in masks] == ["learn"] * 4 + ["fine_tune"] * 3
    ratios = [0.8 * (1 - (1 - t / 6) ** 3) for t in range(4)]
    kept = [math.floor((1 - ratio) * (SIZE - HEAD) + 0.5) + HEAD for ratio in ratios]
    assert [int(mask.sum()) for _, mask, _ in masks] == kept + kept[-1:] * 3
    assert all(torch.equal(mask, masks[3][1]) for _, mask, _ in masks[4:])
    rows = read_rows(folder / "metrics.csv")
    assert [row["lr"] for row in rows[4:]] == [0.02] * 3 == [rate for *_, rate in masks[4:]]
    assert len({row["lr"] for row in rows[:4]}) == 4
    assert [row["phase"] for row in rows] == [0] * 4 + [1] * 3
    assert "INFO fine_tune 3/3  loss" in (folder / "run.log").read_text()
    mask, model = Mask.load(folder / "mask.safetensors").tensors, load_file(folder / "model.safetensors")
    assert not any(bool(model[name][~kept].any()) for name, kept in mask.items())


def test_fine_tuning_goes_on_with_other_batches_than_learning_began_with(run_in, monkeypatch):
    """It draws as if it were the rounds after the last."""
    seen, fetch = [], FederatedDataModule.fetch

    def spy(self, cohort):
        seen.append((self.trainer.current_epoch, cohort.clients, cohort.samples.flatten().tolist()))
        return fetch(self, cohort)

    monkeypatch.setattr(FederatedDataModule, "fetch", spy)
    run_in(
        "a",
        *FAST,
        "mask_rule=random",
        "phases=fine_tune",
        "phases.fine_tune.rounds=2",
        "federation.rounds=2",
        fast=False,
    )
    tuned = list(seen)
    seen.clear()
    run_in("b", *FAST, "mask_rule=random", "federation.rounds=4", fast=False)
    assert tuned == seen


def test_a_mask_that_needs_an_exploration_is_not_calibrated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="chosen after clients have explored"):
        calibrate.run([*FAST, "mask_rule=autoflip"])


def test_what_was_there_before_the_mask_is_never_best(run_in):
    """Nearly everything is pruned, and nothing learned: the model before was better, and is no result."""
    options = [
        "mask_rule=autoflip",
        "sparsity.mode=prune",
        "sparsity.ratio=0.99",
        "optimizer.lr=1e-6",
        "explore.lr=0.1",
    ]
    summary, folder = run_in("run", *FAST, *options, "federation.rounds=2", fast=False)
    rows = read_rows(folder / "metrics.csv")
    assert rows[0]["val/acc"] > max(row["val/acc"] for row in rows[1:])
    assert summary["test/acc_best"] in [row["test/acc"] for row in rows[1:]]
    saved = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    assert saved["epoch"] >= 1
    mask = Mask.load(folder / "mask.safetensors").tensors
    best = weights(folder, "best")
    assert not any(bool(best[name][~kept].any()) for name, kept in mask.items())


@pytest.mark.parametrize("options", [["data.stream=true", "data.workers=0"], ["federation.cohort=1"]])
def test_where_samples_lie_and_who_trains_together_changes_nothing(run_in, options):
    shared = [*FAST, "mask_rule=autoflip", "explore.steps=null", "explore.epochs=2", "explore.patience=1"]
    shared += ["partition=quantity", "sparsity=gradual80", "federation.rounds=2"]
    one, a = run_in("one", *shared, fast=False)
    two, b = run_in("two", *shared, *options, fast=False)
    assert (a / "traffic.csv").read_text() == (b / "traffic.csv").read_text()
    assert one["client_steps"] == two["client_steps"]
    models = [load_file(folder / "model.safetensors") for folder in (a, b)]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=0, atol=1e-5)


def test_the_picture_and_the_densities_are_of_the_mask_that_was_chosen(run_in, monkeypatch):
    """Everything trains while clients explore: that is no mask to show."""
    told = []
    monkeypatch.setattr(
        "fedsparse.simulation.csv_logger.RoundCSV.log_hyperparams", lambda self, params: told.append(params)
    )
    _, folder = run_in("run", *FAST, "mask_rule=autoflip", "pictures=true", "federation.rounds=1", fast=False)
    assert (folder / "mask.png").is_file()
    found = Mask.load(folder / "mask.safetensors").by_layer()
    assert [set(params["density"].values()) == {1.0} for params in told] == [True, False]
    assert told[-1]["density"] == found
    told.clear()
    run_in("plain", *FAST, "mask_rule=random", "federation.rounds=1", fast=False)
    assert len(told) == 1  # chosen before the first round, told once
