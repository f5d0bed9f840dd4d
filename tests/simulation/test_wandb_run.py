"""What an offline run of Weights & Biases holds, read without its code, against the run folder."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import lightning
import pytest
import yaml
from landscapes import FEW
from wandb_files import segments
from wandb_server import wandb_server

from fedsparse import run
from fedsparse.core.folder import CLIENTS, HYDRA, METRICS, SUMMARY, WEIGHTS
from fedsparse.data.datasets import digits
from fedsparse.data.partition import classes_per_client
from fedsparse.job.tracked import name_of, tags_of
from fedsparse.landscape.drawing import landscape
from fedsparse.landscape.options import Options
from fedsparse.simulation.artifacts import Identity, RoundWandbLogger, WandbRows

SMALL = ["model=mlp", "model.hidden=8", "calibration.head_steps=1", "federation.rounds=2"]
OWN = {"_step", "_timestamp", "_runtime", "_wandb.runtime"}  # what W&B adds itself


class Noting(lightning.Callback):
    """A figure of one's own, which a user's callback logs after the round's row."""

    def on_train_epoch_end(self, trainer, pl_module):
        for logger in trainer.loggers:
            logger.log_metrics({"mine": 0.5 * trainer.current_epoch}, step=trainer.current_epoch + 1)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A run that was named, and the one segment that it wrote."""
    folder = tmp_path_factory.mktemp("named") / "run"
    typed = ["logger.wandb.group=mine", "logger.wandb.notes=a remark", "partition=noniid_nc1", "server=fedadam"]
    more = [
        "evaluation=per_client",
        "evaluation.metrics=[top1]",
        f"+callbacks.own._target_={__name__}.Noting",
        "pictures=false",
    ]
    run([*SMALL, "logger=wandb", *typed, *more, f"hydra.run.dir={folder}"])
    (segment,) = segments(folder)
    return folder, segment


def table_of(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_options_have_their_names_in_the_configuration(held):
    folder, segment = held
    choices = yaml.safe_load((folder / HYDRA).read_text())["hydra"]["runtime"]["choices"]
    assert segment.config["options"] == {key: value for key, value in choices.items() if not key.startswith("hydra/")}
    assert segment.config["options"]["mask_rule"] == "least_sensitive"
    assert segment.config["options"]["experiment"] is None
    assert segment.config["sparsity"]["ratio"] == 0.8
    assert segment.config["density"]["head"] == 1


def test_a_row_is_a_round_and_the_round_is_the_axis(held):
    folder, segment = held
    assert (segment.axes["*"], segment.axes["round"]) == ("round", "")
    assert [row["_step"] for row in segment.rows] == [1, 2]
    best = 0.0
    for row, stored in zip(segment.rows, table_of(folder / METRICS), strict=True):
        best = max(best, float(stored["val/acc"]))
        figures = {key: value for key, value in row.items() if key not in OWN and not key.startswith("clients.")}
        assert figures == {key: float(value) for key, value in stored.items()} | {"val/acc_best": best}
    assert segment.rows[1]["mine"] == 0.5


def test_the_summary_is_that_of_the_run(held):
    folder, segment = held
    stored = json.loads((folder / SUMMARY).read_text())
    assert {key: segment.summary[key] for key in stored} == stored
    assert segment.summary["val/acc_best"] == max(float(row["val/acc"]) for row in table_of(folder / METRICS))


def test_what_is_typed_counts_and_what_is_not_comes_from_the_options(held):
    _, segment = held
    assert (segment.run.run_group, segment.run.notes, segment.run.job_type) == ("mine", "a remark", "train")
    own = ["evaluation=per_client", "evaluation.metrics=[top1]", f"callbacks.own._target_={__name__}.Noting"]
    typed = " ".join([*SMALL, "partition=noniid_nc1", "server=fedadam", *own])
    assert segment.run.display_name == f"{typed[:125]}..."
    assert list(segment.run.tags) == ["digits", "mlp", "noniid_nc1", "least_sensitive", "s80"] + [
        "evaluation=per_client",
        "server=fedadam",
    ]


def test_the_clients_are_a_table(held):
    folder, segment = held
    (path,) = segment.folder.glob("files/media/table/clients_*.json")
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    parts = classes_per_client(digits().train.labels, 20, 1, 0)
    assert [row["client"] for row in rows] == list(range(20))
    assert {row["classes"] for row in rows} == {1}
    assert [row["samples"] for row in rows] == [len(part) for part in parts]
    found = {}
    for line in table_of(folder / CLIENTS):
        if line["round"] == "2":
            assert rows[int(line["client"])]["test_samples"] == int(line["n"])
            found[int(line["client"]), f"{line['model']}/top1"] = float(line["top1"])
    assert {
        (row["client"], key): row[key] for row in rows for key in row if "top1" in key and row[key] is not None
    } == found


def test_log_model_is_true_or_false(tmp_path):
    with pytest.raises(ValueError, match=r"logger.wandb.log_model is 'all'; it must be true or false"):
        run([*SMALL, "logger=wandb", "logger.wandb.log_model=all", f"hydra.run.dir={tmp_path / 'run'}"])


def test_names_and_tags_are_as_long_as_w_and_b_takes_them():
    assert name_of([f"data.root={'x' * 200}"]) == f"data.root={'x' * 115}..."
    assert tags_of({"data": "d" * 80, "model": None}) == ("d" * 64,)


class Written:
    """Stands for a run of W&B, and keeps what is logged."""

    def __init__(self):
        self.calls = []

    def log(self, figures, **how):
        self.calls.append((figures, how))


def test_a_row_is_closed_when_the_next_round_begins_and_segments_have_steps_of_their_own():
    run_of, best = Written(), {"val/acc_best": 0.5}
    logger = RoundWandbLogger(3, False, best, experiment=run_of)
    trainer = SimpleNamespace(loggers=[logger])
    WandbRows().on_train_epoch_start(trainer, None)  # nothing is open
    logger.log_metrics({"val/acc": 0.4}, step=7)
    logger.log_metrics({"mine": 1.0}, step=7)
    WandbRows().on_train_epoch_start(trainer, None)
    WandbRows().on_train_epoch_start(trainer, None)
    logger.log_metrics({"val/acc": 0.6}, step=8)
    assert run_of.calls == [
        ({"val/acc": 0.4, "val/acc_best": 0.5, "round": 7}, {"step": 10}),
        ({"mine": 1.0, "round": 7}, {"step": 10}),
        ({}, {"commit": True}),
        ({"val/acc": 0.6, "val/acc_best": 0.6, "round": 8}, {"step": 11}),
    ]


def test_environment_variables_of_w_and_b_count_where_nothing_is_typed(tmp_path, monkeypatch):
    identity = Identity("a name", ("a", "b"), "a group", "train")
    assert identity.arguments() == {"name": "a name", "tags": ["a", "b"], "group": "a group", "job_type": "train"}
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert identity.arguments() == {"tags": ["a", "b"], "job_type": "train"}


@pytest.mark.slow
def test_one_line_syncs_all_segments_of_a_run(tmp_path, capsys):
    """A run, its landscape, and more rounds of it: what arrives is in order, and the last summary is whole."""
    folder = tmp_path / "a run"
    run([*SMALL, "logger=wandb", "logger.wandb.log_model=true", f"hydra.run.dir={folder}"])
    first = json.loads((folder / SUMMARY).read_text())
    landscape(folder, Options.read(["data=[test]", *FEW.values()]))
    drawn = segments(folder)[1]
    assert {key: drawn.summary[key] for key in first} == first
    assert {"landscape/lines._type", "pictures/curves._type", "clients._type", "train/loss"} <= drawn.summary.keys()
    run([f"resume={folder}", "federation.rounds=4"])
    line = re.findall(r"wandb sync (.*)", capsys.readouterr().out)[-1]
    with wandb_server() as (address, uploads):
        key, quiet = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}, {"WANDB_ERROR_REPORTING": "false"}
        command = f"{sys.executable} -m wandb sync {line}"
        environment = {**os.environ, "WANDB_MODE": "online", "HOME": str(tmp_path), **key, **quiet}
        done = subprocess.run(["sh", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rounds = [row["round"] for row in uploads.rows]
    steps = [row["_step"] for row in uploads.rows]
    assert rounds == [1, 2, 2, 3, 4]
    assert steps == sorted(set(steps))
    assert uploads.offsets == [0, 2, 3]  # each segment begins behind the one before
    axis = next(axis for axis in uploads.axes if axis.get("2") == "*")
    assert uploads.axes[axis["5"] - 1]["1"] == "round"
    stored = json.loads((folder / SUMMARY).read_text())
    assert {name: uploads.summaries[-1].get(name) for name in stored} == stored  # null is sent as nothing
    rows = table_of(folder / METRICS)
    assert uploads.summaries[-1]["val/acc_best"] == max(float(row["val/acc"]) for row in rows)
    assert uploads.fields["displayName"] == " ".join(SMALL)
    assert json.loads(uploads.fields["config"])["options"]["value"]["partition"] == "iid"


@pytest.mark.slow
def test_pictures_are_images_and_the_model_is_no_checkpoint(tmp_path):
    folder = tmp_path / "run"
    run([*SMALL, "logger=wandb", "logger.wandb.log_model=true", f"hydra.run.dir={folder}"])
    (segment,) = segments(folder)
    for name in ("mask", "partition", "curves"):
        (image,) = segment.folder.glob(f"files/media/images/pictures/{name}_*.png")
        assert image.read_bytes() == (folder / f"{name}.png").read_bytes()
        assert segment.rows[-1][f"pictures/{name}._type"] == "image-file"
    (stored,) = segment.artifacts["model"].manifest.contents
    digest = hashlib.md5((folder / WEIGHTS).read_bytes(), usedforsecurity=False).digest()
    assert (stored.path, stored.digest) == (WEIGHTS, base64.b64encode(digest).decode())
    assert segment.artifacts.keys() == {"mask", "model", "run_table"}
