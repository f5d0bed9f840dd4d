"""Ten run folders of before, ended after two rounds, go on for two more as they did then.

Five are of before the packages of today; the five of ``BETWEEN`` are of the last commit whose ``conf/`` had nodes
below the values that they took (``optimizer.build``, ``model.net``).

``old_runs/expected.json`` holds what the commit that made them came to when it went on with them: the hash of the
global row, and losses, accuracies and bytes of each round. Their paths are written over, nothing else.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from frozen import HERE, canary

from fedsparse import run

FOLDERS = Path(__file__).parent / "old_runs"
SAME_BITS = json.loads(HERE.read_text(encoding="utf-8"))["canary"] == canary()
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))
BETWEEN = ("carried", "variates", "masks_apart", "robust", "surveyed")
MEASURED = {"val/acc", "test/acc", "train/loss"}  # equal to what another processor's rounding leaves of them


def longer(name, folder, round, closed):
    """Bytes up to a round that the wire format of today adds to those of then, in the rounds after the closed ones.

    A header has 48 bytes, then 40, with SCAFFOLD's variates (``drift``) 80; a mask has a header too, then none.
    """
    if name in BETWEEN:
        return {}
    with (folder / "traffic.csv").open(encoding="utf-8", newline="") as file:
        sent = [row for row in csv.DictReader(file) if closed < int(row["round"]) <= round]
    header = 48 - (80 if name == "drift" else 40)
    masks = sum(int(row["first_contact"]) > 0 for row in sent) if name in ("calibrated", "drift", "explored") else 0
    down = sum(int(row["down_header"]) > 0 for row in sent)
    return {"bytes_up": header * len(sent), "bytes_down": header * down, "bytes_setup_down": 48 * masks}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_an_old_run_goes_on_as_it_did_then(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(FOLDERS / name, folder)
    summary = run([f"resume={folder}", "federation.rounds=4", "trainer.accelerator=cpu"])
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    wanted = EXPECTED[name]["rows"]
    assert len(found) == len(wanted) == 4 + (name in ("explored", "surveyed"))
    for row, then in zip(found, wanted, strict=True):
        counts, more = then.keys() - MEASURED, longer(name, folder, int(row["round"]), len(found) - 2)
        assert {key: int(row[key]) for key in counts} == {key: int(then[key]) + more.get(key, 0) for key in counts}
        for key in then.keys() & MEASURED:
            assert float(row[key]) == pytest.approx(float(then[key]), abs=0.01)
    assert not SAME_BITS or summary["global_sha256"] == EXPECTED[name]["global_sha256"]


def test_they_hold_names_that_are_no_more():
    """Else they would say nothing about the table of old names."""
    stored = [(FOLDERS / name / ".hydra" / "config.yaml").read_text(encoding="utf-8") for name in EXPECTED]
    for old in ("adam.SparseAdam", "federation.objective.Scaffold", "federation.client.ClientModule", "fedopt.FedYogi"):
        assert any(f"fedsparse.{old}" in text for text in stored)
