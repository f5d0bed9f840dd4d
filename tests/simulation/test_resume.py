"""Kill it at any moment, go on, and get the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fedsparse import run
from fedsparse.core.folder import LAST, PREVIOUS
from fedsparse.simulation.checkpoint import AtomicCheckpointIO
from fedsparse.simulation.csv_logger import read_rows

RUN = [sys.executable, "-m", "fedsparse.train"]
OPTIONS = ["model=mlp", "logger=csv", "federation.rounds=6", "calibration.head_steps=4", "mask_rule=least_sensitive"]
OPTIONS += ["pictures=false"]
FEEDBACK = [
    "exchange=topk", "exchange.feedback=1.0", "aggregation=coordinate_mean", "aggregation.denominator=participants",
]  # fmt: skip
KEEPING = {  # what lasts over rounds beside the model: with clients, at the server, or in the ledger of who holds what
    "feedback": FEEDBACK,
    "feedback in a file": [*FEEDBACK, "federation.store=file"],
    "scaffold": ["objective=scaffold"],
    "scaffold in a file": ["objective=scaffold", "federation.store=file"],
    "fedyogi, freeze": ["exchange=topk", "server=fedyogi", "server.untouched=freeze"],
    "adamw, whose moments end with the round": [
        "optimizer=adamw",
        "federation.local_steps=null",
        "federation.local_epochs=1",
    ],
    "topk of few": ["exchange=topk", "exchange.fraction=0.01", "federation.clients_per_round=4"],
}
SERVERS = [
    ["server=fedavg"],
    ["server=fedavgm", "schedule=cosine"],
    ["server=fedavgm_ema", "schedule=step", "schedule.every=1", "schedule.gamma=0.99"],
    ["server=fedadam", "federation.eval_every=2"],
]


def start(folder, *options):
    command = [*RUN, *OPTIONS, *options, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)


def wait_for_round(process, number):
    for line in process.stderr:
        if line.startswith(f"round {number}/"):
            return
    raise AssertionError("the run ended early")


def finish_elsewhere(folder, overrides=()):
    """Move the folder, then resume: in this process, which is quicker."""
    moved = Path(f"{folder}-moved")
    shutil.move(folder, moved)
    return run([f"resume={moved}", *overrides]), moved


def sha(summary):
    return summary["global_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("options", SERVERS, ids=lambda o: o[0])
@pytest.mark.parametrize("moment", [*(pytest.param(m, marks=pytest.mark.soak) for m in (0, 3)), 1, 5])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, options, moment):
    whole = run([*OPTIONS, *options, f"hydra.run.dir={tmp_path / 'whole'}"])
    process = start(tmp_path / "killed", *options)
    if moment:
        wait_for_round(process, moment)
    else:  # as soon as the folder is there: no round is closed yet
        while not (tmp_path / "killed" / ".hydra" / "overrides.yaml").exists():
            time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    summary, folder = finish_elsewhere(tmp_path / "killed")
    assert sha(summary) == sha(whole)
    rows = [read_rows(path / "metrics.csv") for path in (tmp_path / "whole", folder)]
    assert [row["round"] for row in rows[1]] == [1, 2, 3, 4, 5, 6]
    for row in [*rows[0], *rows[1]]:
        row.pop("seconds")
    assert rows[1] == rows[0]
    same = [key for key in whole if key not in ("seconds", "peak_memory", "folder")]
    assert {key: summary[key] for key in same} == {key: whole[key] for key in same}


def traffic(folder):
    """Rows of a header, and of each client of each round."""
    return (folder / "traffic.csv").read_text().splitlines()


def same_as_in_one_go(summary, folder, whole, in_one_go):
    """Same bits of the model, same bytes, same rows."""
    different = [key for key in whole if key not in ("seconds", "peak_memory", "folder") and summary[key] != whole[key]]
    assert different == []
    assert traffic(folder) == traffic(in_one_go)
    rounds = [int(line.split(",")[0]) for line in traffic(folder)[1:]]
    assert rounds == sorted(rounds)
    assert set(rounds) == set(range(1, summary["rounds"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("options", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("moment", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_a_killed_run_goes_on_with_what_is_kept_between_rounds(tmp_path, options, moment):
    whole = run([*OPTIONS, *options, f"hydra.run.dir={tmp_path / 'whole'}"])
    process = start(tmp_path / "killed", *options)
    wait_for_round(process, moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    summary, folder = finish_elsewhere(tmp_path / "killed")
    same_as_in_one_go(summary, folder, whole, tmp_path / "whole")


@pytest.mark.parametrize("options", KEEPING.values(), ids=KEEPING)
def test_a_round_that_was_closed_but_not_saved_counts_once(tmp_path, monkeypatch, options):
    """A kill after a round's rows are in traffic.csv and what clients keep is written, before the checkpoint is."""
    few = [*OPTIONS, *options, "federation.rounds=3"]
    whole = run([*few, f"hydra.run.dir={tmp_path / 'whole'}"])
    save, calls = AtomicCheckpointIO.save_checkpoint, []

    def killed(self, state, path, *rest, **more):
        calls.append(state["epoch"])
        if state["epoch"] == 1:
            raise KeyboardInterrupt
        save(self, state, path, *rest, **more)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run([*few, f"hydra.run.dir={tmp_path / 'killed'}"])
    monkeypatch.undo()
    assert calls[-1] == 1
    with (tmp_path / "killed" / "traffic.csv").open("a") as file:
        file.write("3,7,8")  # and a line that the kill tore
    assert len(traffic(tmp_path / "killed")) > 2 * (len(traffic(tmp_path / "whole")) - 1) // 3
    summary, folder = finish_elsewhere(tmp_path / "killed")
    same_as_in_one_go(summary, folder, whole, tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_closes_the_round_and_exits_with_143(tmp_path):
    whole = run([*OPTIONS, "federation.rounds=40", f"hydra.run.dir={tmp_path / 'whole'}"])
    process = start(tmp_path / "stopped", "federation.rounds=40")
    wait_for_round(process, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    closed = len(read_rows(tmp_path / "stopped" / "metrics.csv"))
    assert 2 <= closed < 40
    saved = torch.load(tmp_path / "stopped" / "checkpoints" / LAST, weights_only=True)
    assert saved["epoch"] + 1 == closed
    assert not (tmp_path / "stopped" / "summary.json").exists()
    summary, _ = finish_elsewhere(tmp_path / "stopped")
    assert sha(summary) == sha(whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three rounds in one go, and the folder of the same run of two."""
    place = tmp_path_factory.mktemp("finished")
    options = [*OPTIONS, f"calibration.cache={place / 'cache'}"]
    whole = run([*options, "federation.rounds=3", f"hydra.run.dir={place / 'whole'}"])
    run([*options, "federation.rounds=2", f"hydra.run.dir={place / 'part'}"])
    return whole, place / "part"


@pytest.fixture
def stopped(finished, tmp_path, monkeypatch):
    """A run of three rounds in one go, and a folder in which the same run stands after two."""
    monkeypatch.chdir(tmp_path)
    return finished[0], shutil.copytree(finished[1], tmp_path / "stopped")


def test_more_rounds_may_be_asked_for(stopped):
    whole, folder = stopped
    hydra = {path.name: path.read_text() for path in (folder / ".hydra").iterdir()}
    summary = run([f"resume={folder}", "federation.rounds=3"])
    assert sha(summary) == sha(whole)
    assert {path.name: path.read_text() for path in (folder / ".hydra").iterdir()} == hydra
    assert [row["round"] for row in read_rows(folder / "metrics.csv")] == [1, 2, 3]


def test_a_finished_run_is_reported_and_not_touched(stopped, capsys):
    _, folder = stopped
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    summary = run([f"resume={folder}"])
    assert "is finished after 2 rounds" in capsys.readouterr().out
    assert summary["rounds"] == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_fewer_rounds_than_are_closed_are_refused(stopped):
    _, folder = stopped
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="2 rounds are closed already"):
        run([f"resume={folder}", "federation.rounds=1"])


def test_a_kill_before_the_summary_leaves_only_that_to_do(stopped):
    _, folder = stopped
    before = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    (folder / "model.safetensors").unlink()
    after = run([f"resume={folder}"])
    own = ("folder", "peak_memory")  # memory is this process's
    assert {k: v for k, v in after.items() if k not in own} == {k: v for k, v in before.items() if k not in own}
    assert (folder / "model.safetensors").is_file()


def damage_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_foreign(path):
    torch.save({"state_dict": {"net.other": torch.zeros(3)}, "epoch": 1}, path)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_half, damage_one_bit, make_foreign, empty])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(stopped, damage, caplog):
    whole, folder = stopped
    damage(folder / "checkpoints" / LAST)
    summary = run([f"resume={folder}", "federation.rounds=3"])
    assert sha(summary) == sha(whole)
    assert "the one before it is used" in caplog.text
    assert [row["round"] for row in read_rows(folder / "metrics.csv")] == [1, 2, 3]


def test_if_no_checkpoint_is_whole_nothing_is_touched(stopped):
    _, folder = stopped
    for name in (LAST, PREVIOUS):
        damage_half(folder / "checkpoints" / name)
    table = (folder / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="no whole checkpoint is left"):
        run([f"resume={folder}", "federation.rounds=3"])
    assert (folder / "metrics.csv").read_text() == table


@pytest.mark.parametrize("override", ["mask_rule=random", "seed=3", "optimizer.lr=0.2", "model.head=x"])
def test_what_shapes_the_run_cannot_be_overridden(stopped, override):
    with pytest.raises(ValueError, match="only federation.rounds"):
        run([f"resume={stopped[1]}", override])


def test_trainer_and_logger_may_be_overridden(stopped):
    whole, folder = stopped
    options = ["federation.rounds=3", "trainer.accelerator=cpu", "logger=tensorboard"]
    assert sha(run([f"resume={folder}", *options])) == sha(whole)
    assert list((folder / "tensorboard").glob("events*"))


def test_a_foreign_target_is_refused_by_name(stopped):
    _, folder = stopped
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    cfg.aggregation = {"_target_": "os.system", "command": "touch hacked"}
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    with pytest.raises(ValueError, match=r"os\.system"):
        run([f"resume={folder}", "federation.rounds=3"])
    assert not (Path.cwd() / "hacked").exists()


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        run([f"resume={tmp_path / 'nothing'}"])


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / LAST
    io.save_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"epoch": 2}, path)
    assert io.load_checkpoint(path)["epoch"] == 1
    monkeypatch.undo()
    io.save_checkpoint({"epoch": 3}, path)
    assert io.load_checkpoint(path)["epoch"] == 3
    assert io.load_checkpoint(path.with_name(PREVIOUS))["epoch"] == 1


def test_the_best_model_is_remembered_over_a_resume(stopped):
    _, folder = stopped
    moved = Path(f"{folder}-moved")
    shutil.move(folder, moved)
    summary = run([f"resume={moved}", "federation.rounds=3"])
    rows = read_rows(moved / "metrics.csv")
    best = max(rows, key=lambda row: row["val/acc"])
    saved = torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] + 1 == best["round"]
    assert summary["test/acc_best"] == best["test/acc"]
    assert json.loads((moved / "summary.json").read_text()) | {"folder": str(moved)} == summary
