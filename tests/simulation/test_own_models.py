"""Own models of all clients: the global row with what each client keeps, by hand from the stores."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from composed import composed
from rich.console import Console
from small import Small, small_data, small_net, uneven_parts
from torch.nn.functional import cross_entropy

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Dataset, Split
from fedsparse.federation.client.training import LOCAL
from fedsparse.job.assemble import assemble, assemble_problem
from fedsparse.job.shards import deal_validation
from fedsparse.job.summary import headline, print_table
from fedsparse.simulation.csv_logger import read_rows
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.own_models import OwnModels
from fedsparse.simulation.tracking import RoundLog

NONE = np.array([], dtype=int)
TESTS = [np.arange(0, 9), np.arange(9, 12), NONE, np.arange(12, 30), *[np.array([1, 5])] * 3]
VALS = [np.arange(3, 20), NONE, np.array([7]), np.arange(10, 30), *[np.array([0, 2, 4])] * 3]


class Two:
    groups = 2

    def group(self, clients):
        return tuple(client % 2 for client in clients)


def fitted(tmp_path, local, topology=None, count=3):
    net = small_net()
    space = ParamSpace.of(net, lambda name: True, local)
    small = Small(net, small_data(), uneven_parts(), count=count, space=space, data={"tests": TESTS, "vals": VALS})
    if topology is not None:
        small.given["topology"] = topology
    own = OwnModels(small.rounds)
    log = RoundLog(small.rounds, Evaluation(TESTS), own)
    small.callbacks = [log.evaluation, own, log]
    small.fit(2, tmp_path)
    return small, log


@pytest.mark.parametrize("topology", [None, Two()], ids=["one model", "two groups"])
def test_every_client_is_evaluated_with_what_it_keeps(tmp_path, topology):
    small, log = fitted(tmp_path, ["3.*"], topology)
    (accuracies, losses), kept = by_hand(small, small.dataset.test, TESTS, bool(topology))
    (val_accuracies, val_losses), _ = by_hand(small, small.dataset.val, VALS, bool(topology))
    assert 2 <= kept < len(accuracies)  # some have trained, and some never took part
    row = log.row
    assert row["personal/acc_mean"] == pytest.approx(np.mean(accuracies))
    assert row["personal/acc_worst10"] == pytest.approx(min(accuracies))
    assert row["personal/acc_std"] == pytest.approx(np.std(accuracies))
    assert row["personal/loss"] == pytest.approx(np.mean(losses))
    assert row["personal/acc_mean"] != row["client/acc_mean"]
    assert (len(accuracies), len(val_accuracies)) == (6, 6)  # a client without a part is left out
    assert row["val/personal_acc"] == np.float32(np.mean(val_accuracies))
    assert row["val/personal_loss"] == pytest.approx(np.mean(val_losses))
    assert row["val/personal_acc"] != row["val/acc"]


def by_hand(small, split, parts, two):
    """Accuracies and losses of clients with a part, and how many of them have stored values that have moved."""
    federation, accuracies, losses, kept = small.federation, [], [], 0
    for client, part in enumerate(parts):
        if not len(part):
            continue
        row = federation.server.rows[client % 2 if two else 0].clone()
        stays = small.space.local
        stored = federation.stores[LOCAL].get(client, row[stays])
        kept += not torch.equal(stored, row[stays])
        row[stays] = stored
        net = small_net(seed=9)
        small.space.write(net, row)
        logits = net(split.x[part])
        accuracies.append(float((logits.argmax(1) == split.y[part]).double().mean()))
        losses.append(float(cross_entropy(logits.detach(), split.y[part])))
    return (accuracies, losses), kept


@pytest.mark.parametrize(("option", "there"), [("model.local=[hidden.*]", True), ("model.local=[]", False)])
def test_a_run_has_them_where_something_stays(tmp_path, option, there):
    small = ["model=mlp", "logger=csv", "pictures=false", "federation.rounds=1", "calibration.head_steps=1"]
    summary = run([*small, option, f"hydra.run.dir={tmp_path}"])
    for key in ("personal/acc_mean", "val/personal_acc", "val/personal_loss", "personal/acc_best"):
        assert (key in summary) is there, key
    assert ("val/personal_acc" in read_rows(tmp_path / "metrics.csv")[0]) is there


KEPT = ("model=mlp", "model.local=[hidden.*]", "logger=csv", "pictures=false", "calibration.head_steps=1")
KEPT += ("mask_rule=dense", "partition=noniid_nc2", "calibration.cache=null")
CHOOSING = (*KEPT, "optimizer.lr=1.0", "seed=1", "federation.rounds=6", "federation.local_steps=2")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run whose own models are best in another round than the global model."""
    folder = tmp_path_factory.mktemp("own") / "run"
    return run([*CHOOSING, f"hydra.run.dir={folder}"]), folder


def test_the_best_checkpoint_is_of_the_round_with_the_best_own_models(chosen):
    summary, folder = chosen
    rows = read_rows(folder / "metrics.csv")
    best, other = (max(rows, key=lambda row: row[key]) for key in ("val/personal_acc", "val/acc"))
    assert best["round"] != other["round"]
    assert torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] + 1 == best["round"]
    assert summary["test/acc_best"] == best["test/acc"]
    assert summary["personal/acc_best"] == best["personal/acc_mean"]


def test_the_lines_of_rounds_and_the_table_show_own_models(chosen):
    summary, folder = chosen
    said = re.findall(r"val acc +(\d+\.\d\d)%", (folder / "run.log").read_text())
    assert said == [f"{100 * row['val/personal_acc']:.2f}" for row in read_rows(folder / "metrics.csv")]
    console = Console(file=io.StringIO(), width=150)
    print_table(folder, summary, console)
    lines = console.file.getvalue().splitlines()
    first, whole = (next(i for i, line in enumerate(lines) if name in line) for name in ("own models, mean", "shared"))
    assert f"{summary['personal/acc_mean']:.1%}" in lines[first]
    assert f"{summary['test/acc']:.1%}" in lines[whole]
    assert first < whole
    assert headline(summary) == f"accuracy of clients' own models {summary['personal/acc_mean']:.1%}"


def test_a_resumed_run_has_the_same_figures_and_the_same_best_round(chosen, tmp_path):
    run([*CHOOSING, "federation.rounds=2", f"hydra.run.dir={tmp_path / 'cut'}"])
    run([f"resume={tmp_path / 'cut'}", "federation.rounds=6"])
    rows, bests = [], []
    for folder in (chosen[1], tmp_path / "cut"):
        found = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "metrics.csv")]
        rows.append(found)
        bests.append(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"])
    assert rows[0] == rows[1]
    assert bests[0] == bests[1]


@pytest.mark.slow
def test_two_processes_find_the_same_figures(tmp_path):
    options = (*KEPT, "federation.rounds=2", "federation.eval_every=2", "federation.cohort=2")
    for devices in (1, 2):
        run([*options, f"trainer.devices={devices}", f"hydra.run.dir={tmp_path / str(devices)}"])
    one, two = (read_rows(tmp_path / name / "metrics.csv") for name in ("1", "2"))
    assert ["val/personal_acc" in row for row in one] == [False, True]  # where an evaluation is due
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in one] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in two
    ]


@pytest.mark.parametrize(
    ("typed", "monitor"),
    [
        ((), "val/acc"),
        (("model.local=[hidden.*]",), "val/personal_acc"),
        (("federation.buffers=local",), "val/personal_acc"),
        (("model.local=[hidden.*]", "callbacks.early_stopping.monitor=val/loss"), "val/loss"),
    ],
    ids=str,
)
def test_runs_stop_early_by_what_chooses_the_best_round(typed, monitor):
    session = assemble(composed("model=mlp", "callbacks=early_stopping", *typed)).session
    assert session.callbacks[0].monitor == monitor
    assert (session.monitor == monitor) is (monitor != "val/loss")


def test_where_no_client_has_a_validation_sample_the_global_model_chooses():
    problem = assemble_problem(composed("model=mlp", "model.local=[hidden.*]"))
    assert sum(len(part) for part in problem.vals) >= 0.9 * len(problem.dataset.val.y)
    assert replace(problem, vals=[NONE] * 20).monitor == "val/acc"


def test_validation_samples_are_dealt_by_class_or_by_user():
    x, users = torch.zeros(6, 1, 1, 1), np.array(["b", "a", "b", "a", "b", "a"])
    train = Split(x, torch.tensor([0, 1, 0, 1, 0, 1]), users)
    val = Split(x, torch.tensor([1, 1, 1, 0, 0, 0]), np.array(["b", "c", "b", "a", "c", "c"]))
    data, parts = Dataset(train, val, val, classes=2, name="six"), [np.array([1, 3, 5]), np.array([0, 2, 4])]
    assert [part.tolist() for part in deal_validation(data, parts, 0)] == [[0, 1, 2], [3, 4, 5]]
    assert [part.tolist() for part in deal_validation(data, parts, 0, users=True)] == [[3], [0, 2]]
    without = replace(data, val=replace(val, users=None))
    assert [part.tolist() for part in deal_validation(without, parts, 0, users=True)] == [[0, 1, 2], [3, 4, 5]]
