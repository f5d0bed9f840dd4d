"""The table of runs against rows written by hand, with pandas and without; no damaged folder is missing in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml
from test_report import a_run

import fedsparse

ROOT = Path(__file__).parents[2]
WITHOUT_PANDAS = """
import json, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
hidden = lambda name: name.partition(".")[0] == "pandas"
PathFinder.find_spec = staticmethod(lambda name, *where: None if hidden(name) else find(name, *where))
import fedsparse
print(json.dumps(fedsparse.runs(sys.argv[1:])))
"""
LANDSCAPE = {
    "round": 3,
    "options": {"seed": 0, "grid": 3},
    "models": {
        "key": "abc",
        "models": {
            "global": {
                "train": {"loss": 0.25, "accuracy": 0.9},
                "test": {"loss": 0.5, "accuracy": 0.8},
                "from_start": 4.0,
            }
        },
        "distances": {"global to client 0": 2.5},
    },
    "surface test": {"key": "abc", "points": 9, "gaps": 0, "lowest_loss": 0.1},
    "lines client:0": {
        "at": [0.0, 0.5, 1.0],
        "lines": {
            "global to client 0": {
                "loss": [1.0, 4.0, 2.0],
                "accuracy": [0.5, 0.25, 0.5],
                "gaps": 0,
                "loss_barrier": {"above_chord": 2.5, "above_worse_end": 2.0, "worst": 4.0},
                "accuracy_barrier": {"above_chord": 0.25, "above_worse_end": None, "worst": 0.25},
            }
        },
    },
    "curvature": {
        "samples": 256,
        "eigenvalues": [-9.0, 4.0],
        "bounds": [0.1, 0.2],
        "trace": 12.5,
        "trace_error": 0.5,
        "frobenius": 10.0,
        "frobenius_error": 0.25,
    },
    "sharpness": {"rho": 0.05, "sam": {"rise": 0.75, "first_order": 0.5}, "path_norm": {"value": None, "why": "a"}},
}
OF_LANDSCAPE = {
    "landscape/round": 3,
    "landscape/lambda_1": -9.0,
    "landscape/trace": 12.5,
    "landscape/trace_error": 0.5,
    "landscape/frobenius": 10.0,
    "landscape/frobenius_error": 0.25,
    "landscape/client:0/global to client 0/loss_barrier/above_chord": 2.5,
    "landscape/client:0/global to client 0/loss_barrier/above_worse_end": 2.0,
    "landscape/client:0/global to client 0/loss_barrier/worst": 4.0,
    "landscape/client:0/global to client 0/accuracy_barrier/above_chord": 0.25,
    "landscape/client:0/global to client 0/accuracy_barrier/worst": 0.25,
    "landscape/sharpness/rho": 0.05,
    "landscape/sharpness/sam/rise": 0.75,
    "landscape/sharpness/sam/first_order": 0.5,
    "landscape/distance/global to client 0": 2.5,
    "landscape/global/train/loss": 0.25,
    "landscape/global/train/accuracy": 0.9,
    "landscape/global/test/loss": 0.5,
    "landscape/global/test/accuracy": 0.8,
    "landscape/global/from_start": 4.0,
}
GROUPS = {"optimizer": "sgdm", "mask_rule": "random", "data": "digits", "model": "mlp", "partition": "iid"}


def typed(folder, *overrides, **chosen):
    """What Hydra writes beside the configuration."""
    choices = GROUPS | {"sparsity": "s80", "experiment": None, "hydra/launcher": "basic"} | chosen
    (folder / ".hydra/hydra.yaml").write_text(yaml.safe_dump({"hydra": {"runtime": {"choices": choices}}}))
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Two machines: one with a landscape and an unfinished run, one with an older run and a damaged one."""
    first = typed(a_run(tmp_path / "here/day/one"), "model=mlp", "optimizer.lr=0.1")
    (first / "landscape").mkdir()
    (first / "landscape/landscape.json").write_text(json.dumps(LANDSCAPE))
    running = typed(a_run(tmp_path / "here/day/two", seed=7), "seed=7", mask_rule="talos")
    (running / "summary.json").unlink()
    a_run(tmp_path / "there/old", rule="dense", seed=1, val=0.9, test=0.6)
    damaged = typed(a_run(tmp_path / "there/torn", seed=2))
    (damaged / "summary.json").write_text('{"val/acc": 0.')
    return [tmp_path / "here", tmp_path / "there"]


def by_hand(seed, val, test, rule):
    """What ``a_run`` writes into a summary."""
    return {
        "seed": seed,
        "val/acc": val,
        "test/acc": test,
        "client/acc_mean": test,
        "client/acc_std": 0.05,
        "client/acc_worst10": test - 0.1,
        "trainable_fraction": 0.2,
        "bytes_up": 1_000_000,
        "bytes_total": 3_000_000,
        "rounds": 3,
        "mask_rule": rule,
        "partition": "iid",
        "data": "digits",
        "model": "mlp",
    }


def expected():
    """Rows by hand; what is missing in one is None."""
    head = ["folder", "finished", "problem", "overrides"]
    own = [
        ("here/day/one", True, None, "model=mlp optimizer.lr=0.1"),
        ("here/day/two", False, "not finished: no summary.json after round 3 of 3", "seed=7"),
        ("there/old", True, None, None),
        ("there/torn", False, "summary.json is damaged: it is not JSON", ""),
    ]
    rest = [
        GROUPS | by_hand(0, 0.8, 0.7, "random") | {"sparsity": 0.8} | OF_LANDSCAPE,
        GROUPS | {"seed": 7, "mask_rule": "talos"},
        by_hand(1, 0.9, 0.6, "dense") | {"sparsity": 0.0},
        GROUPS | {"seed": 2},
    ]
    columns = dict.fromkeys([*head, *(key for row in rest for key in row)])
    return [columns | dict(zip(head, one, strict=True)) | row for one, row in zip(own, rest, strict=True)]


def without_pandas(*folders):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PANDAS, *map(str, folders)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow  # it starts a process
def test_without_pandas_it_is_the_list_of_rows(folders):
    found = without_pandas(*folders)
    assert found == expected()
    columns = list(found[0])
    assert all(list(row) == columns for row in found)
    assert columns[:4] == ["folder", "finished", "problem", "overrides"]
    last = [key.startswith("landscape/") for key in columns]
    assert last == sorted(last)
    assert columns.index("optimizer") < columns.index("seed") < columns.index("test/acc")


def test_with_pandas_it_is_a_frame_of_the_same_rows(folders):
    found = fedsparse.runs(folders)
    rows = expected()
    assert set(found.columns) == set(rows[0])
    pandas.testing.assert_frame_equal(found, pandas.DataFrame(rows, columns=list(found.columns)))
    assert found.loc[found["finished"], "test/acc"].tolist() == [0.7, 0.6]


def test_equal_folders_give_an_equal_table_wherever_they_lie(folders, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / "copies" / folder.name) for folder in folders]
    found = fedsparse.runs(folders)
    pandas.testing.assert_frame_equal(found, fedsparse.runs(reversed(copies)))
    pandas.testing.assert_frame_equal(found, fedsparse.runs(iter(folders)))


def test_one_folder_is_given_by_its_path_and_a_folder_above_names_the_runs_below(folders):
    found = fedsparse.runs(str(folders[0]))
    assert found["folder"].tolist() == ["day/one", "day/two"]
    (whole,) = {tuple(fedsparse.runs(top)["folder"]) for top in (folders[0].parent, [folders[0].parent, *folders])}
    assert whole == ("here/day/one", "here/day/two", "there/old", "there/torn")


def test_a_place_without_runs_is_one_line(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "misspelt"):
        with pytest.raises(ValueError, match=f"^no run .* below {wrong}$"):
            fedsparse.runs([*folders, wrong])


DAMAGES = {  # of a finished run with a landscape -> what its row says, and whether it has figures
    "no configuration": (lambda folder: (folder / ".hydra/config.yaml").unlink(), "no .hydra/config.yaml", False),
    "no metrics": (lambda folder: (folder / "metrics.csv").unlink(), "metrics.csv is missing or damaged", True),
    "hydra.yaml is a list": (lambda folder: (folder / ".hydra/hydra.yaml").write_text("[1]"), None, True),
    "overrides are no list": (lambda folder: (folder / ".hydra/overrides.yaml").write_text("a: 1"), None, True),
    "torn landscape": (
        lambda folder: (folder / "landscape/landscape.json").write_text('{"round": '),
        "landscape.json is damaged: it is not JSON",
        True,
    ),
    "landscape of a list": (
        lambda folder: (folder / "landscape/landscape.json").write_text("[]"),
        "landscape.json is damaged: it holds no keys",
        True,
    ),
    "landscape of brackets": (
        lambda folder: (folder / "landscape/landscape.json").write_text("[" * 100_000),
        "landscape.json is damaged: it is not JSON",
        True,
    ),
    "a folder for a landscape": (
        lambda folder: ((folder / "landscape/landscape.json").unlink(), os.mkdir(folder / "landscape/landscape.json")),
        "landscape.json cannot be read: Is a directory",
        True,
    ),
    "other shapes": (
        lambda folder: (folder / "landscape/landscape.json").write_text(
            json.dumps({"curvature": [1], "lines a": 3, "lines b": {"lines": {"x": 1}}, "models": {"models": 2}})
        ),
        None,
        True,
    ),
    "no eigenvalues": (
        lambda folder: (folder / "landscape/landscape.json").write_text('{"curvature": {"eigenvalues": [null]}}'),
        None,
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_a_row_that_says_why(folders, name):
    damage, why, figures = DAMAGES[name]
    damage(folders[0] / "day/one")
    found = fedsparse.runs(folders)
    assert found["folder"].tolist() == ["here/day/one", "here/day/two", "there/old", "there/torn"]
    row = found.iloc[0]
    assert row["finished"] == figures
    assert (row["test/acc"] == 0.7) == figures
    if why is None:
        assert pandas.isna(row["problem"])
    else:
        assert why in row["problem"]
    if name in ("other shapes", "no eigenvalues"):
        assert not [column for column in found.columns if column.startswith("landscape/")]


def test_a_summary_cannot_take_the_place_of_what_the_table_says_itself(folders):
    path = folders[0] / "day/one/summary.json"
    forged = {"folder": "x", "finished": False, "problem": "y", "overrides": "z", "landscape/trace": 1.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | forged))
    row = fedsparse.runs(folders).iloc[0]
    assert row["folder"] == "here/day/one"
    assert row["finished"]
    assert pandas.isna(row["problem"])
    assert row["overrides"] == "model=mlp optimizer.lr=0.1"


def test_a_run_of_today_and_one_of_earlier_keys_are_rows(run_in, tmp_path):
    summary, folder = run_in("runs/now", "mask_rule=random", "federation.rounds=1", "pictures=false")
    then = shutil.copytree(folder, tmp_path / "runs/then")
    stored = yaml.safe_load((then / ".hydra/config.yaml").read_text())
    stored["optimizer"] = {"build": stored["optimizer"]}
    (then / ".hydra/config.yaml").write_text(yaml.safe_dump(stored))
    found = fedsparse.runs(tmp_path / "runs")
    now = found.iloc[0]
    assert now["overrides"].startswith("model=mlp logger=csv federation.rounds=3 calibration.head_steps=4 pictures=")
    told = {key: value for key, value in summary.items() if key != "folder" and value is not None}
    assert {key: now[key] for key in told} == told
    assert now["optimizer"] == "sgdm"
    assert found["finished"].tolist() == [True, True]
    assert found["lr"].tolist() == [summary["lr"]] * 2
