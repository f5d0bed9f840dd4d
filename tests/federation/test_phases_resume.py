"""A run of several phases, or with masks that change, killed and gone on with: the same bits as in one go."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedsparse import run, weights
from fedsparse.core.folder import LAST
from fedsparse.core.space import ParamSpace
from fedsparse.job.finished import SAVED
from fedsparse.masks import Mask
from fedsparse.simulation.checkpoint import AtomicCheckpointIO, read_checkpoint
from fedsparse.simulation.csv_logger import read_rows

FAST = ["model=mlp", "logger=csv", "pictures=false", "calibration.cache=null", "calibration.head_steps=2"]
FAST += ["federation.num_clients=6", "federation.rounds=4", "explore.steps=3", "sparsity.ratio=0.7"]
GRADUAL = ["sparsity=gradual80", "sparsity.schedule.steps=3", "sparsity.renew_every=2"]
FEEDBACK = [
    *("exchange=topk", "exchange.feedback=1.0", "exchange.fraction=0.3"),
    *("aggregation=coordinate_mean", "aggregation.denominator=participants"),
]
RUNS = {
    "explore twice": ["mask_rule=autoflip", "phases.explore.rounds=2", "server=fedadam"],
    "explore twice, prune, one at a time": [
        *("mask_rule=autoflip", "phases.explore.rounds=2", "federation.cohort=1", "sparsity.mode=prune"),
    ],
    "explore twice, prune": ["mask_rule=autoflip", "phases.explore.rounds=2", "sparsity.mode=prune", "server=fedavgm"],
    "patience, head start": [
        *("mask_rule=autoflip", "explore.keep_model=true", "explore.steps=null", "explore.epochs=4"),
        "explore.patience=1",
    ],
    "refine": ["mask_rule=autoflip", *GRADUAL, "mask_rule.refine=true", "sparsity.mode=prune", "server=fedadam"],
    "gradual, feedback": ["mask_rule=random", *GRADUAL, *FEEDBACK, "sparsity.mode=prune"],
    "movement, scaffold": ["mask_rule=movement", *GRADUAL, "objective=scaffold"],
    "renewed, local head": ["mask_rule=highest_magnitude", "sparsity.renew_every=1", "model.local=[head.*]"],
    "renewed, calibrated": ["mask_rule=least_sensitive", *GRADUAL, "server=fedyogi", "federation.cohort=1"],
    "fine_tune": ["mask_rule=random", "phases=fine_tune", "phases.fine_tune.rounds=2", "schedule=cosine"],
    "per client": ["mask_rule=autoflip", "evaluation=per_client", *GRADUAL],
}
SHORT = ("explore twice, prune", "gradual, feedback")  # with one moment of the kill, they are quick


def rows_of(folder):
    rows = read_rows(folder / "metrics.csv")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(one, two, folders):
    different = [key for key in one if key not in ("seconds", "peak_memory", "folder") and one[key] != two[key]]
    assert different == []
    first, second = folders
    assert (first / "traffic.csv").read_text() == (second / "traffic.csv").read_text()
    assert rows_of(first) == rows_of(second)
    masks = [Mask.load(folder / "mask.safetensors") for folder in folders]
    assert masks[0].metadata == masks[1].metadata
    for name, mask in masks[0].tensors.items():
        assert torch.equal(mask, masks[1].tensors[name])
    models = [load_file(folder / "model.safetensors") for folder in folders]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name])


def stop_at(monkeypatch, epoch, options, folder):
    """Run until the checkpoint of a round is to be written, and end there as a kill would."""
    save = AtomicCheckpointIO.save_checkpoint

    def killed(self, state, path, *rest, **more):
        if state["epoch"] == epoch:
            raise KeyboardInterrupt
        save(self, state, path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run([*options, f"hydra.run.dir={folder}"])
    return folder


def killed_and_gone_on(tmp_path, monkeypatch, name, moments):
    monkeypatch.chdir(tmp_path)
    options = [*FAST, *RUNS[name]]
    whole = run([*options, f"hydra.run.dir={tmp_path / 'whole'}"])
    for epoch in moments:
        folder = stop_at(monkeypatch, epoch, options, tmp_path / f"killed-{epoch}")
        moved = Path(f"{folder}-moved")
        shutil.move(folder, moved)
        same(whole, run([f"resume={moved}"]), (tmp_path / "whole", moved))
    pruned_is_zero(tmp_path / "whole", "sparsity.mode=prune" in options)


@pytest.mark.parametrize("name", SHORT)
def test_a_round_that_is_lost_changes_nothing(tmp_path, monkeypatch, name):
    killed_and_gone_on(tmp_path, monkeypatch, name, [2])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_kill_in_every_phase_changes_nothing(tmp_path, monkeypatch, name):
    """Rounds (from 0) that are closed and lost: in the exploration, at its end, after it, between choices."""
    killed_and_gone_on(tmp_path, monkeypatch, name, [1, 2, 3])


def pruned_is_zero(folder, prune):
    """In the model and in all checkpoints; each has its own mask."""
    mask, model = Mask.load(folder / "mask.safetensors").tensors, load_file(folder / "model.safetensors")
    zero = {name: bool((model[name][~kept] == 0).all()) for name, kept in mask.items() if not kept.all()}
    assert all(zero.values()) == prune
    for name in ("best", "last", "previous") if prune else ():
        state, space = weights(folder, name), space_of(mask)
        saved = read_checkpoint(folder / "checkpoints" / SAVED[name], space)
        assert not bool(torch.cat([state[name].flatten() for name in mask])[~saved["state_dict"]["mask"]].any())


def space_of(mask):
    return ParamSpace(list(mask), [kept.shape for kept in mask.values()])


@pytest.mark.parametrize("cohort", [1, 4])
def test_in_checkpoints_too_what_is_pruned_is_zero(tmp_path, monkeypatch, cohort):
    monkeypatch.chdir(tmp_path)
    options = [*FAST, "mask_rule=autoflip", "sparsity.mode=prune", f"federation.cohort={cohort}"]
    stop_at(monkeypatch, 2, options, tmp_path / "killed")
    mask = Mask.load(tmp_path / "killed/mask.safetensors")
    state = read_checkpoint(tmp_path / "killed/checkpoints" / LAST, space_of(mask.tensors))
    held = weights(tmp_path / "killed")
    net = torch.cat([held[name].flatten() for name in mask.tensors])
    row = torch.cat([tensor.flatten() for tensor in mask.tensors.values()])
    assert state["epoch"] == 1
    assert torch.equal(state["state_dict"]["mask"], row)
    assert 0 < int(row.sum()) < len(row)
    assert not bool(net[~row].any())


@pytest.mark.parametrize(
    "options",
    [
        ["mask_rule=autoflip"],
        ["mask_rule=random", "sparsity.renew_every=2", "sparsity=gradual80", "sparsity.schedule.steps=3"],
        ["mask_rule=highest_magnitude", "sparsity.renew_every=1", "sparsity.mode=prune", "server=fedadam"],
    ],
    ids=["explore", "gradual", "renewed"],
)
@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_more_rounds_may_be_asked_for(tmp_path, monkeypatch, options, first):
    """A mask that would have been chosen after the last round is chosen when there are more."""
    monkeypatch.chdir(tmp_path)
    few = [*FAST, *options, f"federation.rounds={first}"]
    whole = run([*FAST, *options, "federation.rounds=3", f"hydra.run.dir={tmp_path / 'whole'}"])
    run([*few, f"hydra.run.dir={tmp_path / 'part'}"])
    more = run([f"resume={tmp_path / 'part'}", "federation.rounds=3"])
    same(whole, more, (tmp_path / "whole", tmp_path / "part"))


def test_more_rounds_than_would_fit_the_phases_are_refused(tmp_path, monkeypatch):
    """Three rounds of learning and one of fine-tuning are closed: a fourth of learning would come too late."""
    monkeypatch.chdir(tmp_path)
    options = [*FAST, "mask_rule=random", "phases=fine_tune", "phases.fine_tune.rounds=2", "federation.rounds=3"]
    run([*options, f"hydra.run.dir={tmp_path / 'part'}"])
    before = (tmp_path / "part/metrics.csv").read_text()
    with pytest.raises(ValueError, match="closed are learn 3, fine_tune 2: .* only the last phase can be given more"):
        run([f"resume={tmp_path / 'part'}", "federation.rounds=4"])
    assert (tmp_path / "part/metrics.csv").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("explore 1/", ["mask_rule=autoflip", "phases.explore.rounds=40", "explore.steps=20"]),
        ("round 1/", ["mask_rule=autoflip", *GRADUAL, "sparsity.mode=prune"]),
        ("fine_tune 1/", ["mask_rule=random", "phases=fine_tune", "phases.fine_tune.rounds=40"]),
    ],
    ids=["explore", "renewals", "fine_tune"],
)
def test_a_true_kill_changes_nothing(tmp_path, line, options):
    options = [*FAST, *options]
    whole = run([*options, f"hydra.run.dir={tmp_path / 'whole'}"])
    command = [sys.executable, "-m", "fedsparse.train", *options, f"hydra.run.dir={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    assert any(said.startswith(line) for said in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/summary.json").exists()
    same(whole, run([f"resume={tmp_path / 'killed'}"]), (tmp_path / "whole", tmp_path / "killed"))
