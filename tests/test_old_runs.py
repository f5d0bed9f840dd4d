"""Five run folders of before the packages of today, ended after two rounds, go on for two more as they did then.

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
MEASURED = {"val/acc", "test/acc", "train/loss"}  # equal to what another processor's rounding leaves of them


@pytest.mark.parametrize("name", list(EXPECTED))
def test_an_old_run_goes_on_as_it_did_then(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(FOLDERS / name, folder)
    summary = run([f"resume={folder}", "federation.rounds=4", "trainer.accelerator=cpu"])
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    wanted = EXPECTED[name]["rows"]
    assert len(found) == len(wanted) == 4 + (name == "explored")
    for place, (row, then) in enumerate(zip(found, wanted, strict=True)):
        if place < len(found) - 2:  # closed then; the bytes of later rounds are those of another wire format
            assert {key: row[key] for key in then.keys() - MEASURED} == {
                key: then[key] for key in then.keys() - MEASURED
            }
        for key in then.keys() & MEASURED:
            assert float(row[key]) == pytest.approx(float(then[key]), abs=0.01)
    assert not SAME_BITS or summary["global_sha256"] == EXPECTED[name]["global_sha256"]


def test_they_hold_names_that_are_no_more():
    """Else they would say nothing about the table of old names."""
    stored = [(FOLDERS / name / ".hydra" / "config.yaml").read_text(encoding="utf-8") for name in EXPECTED]
    for old in ("adam.SparseAdam", "federation.objective.Scaffold", "federation.client.ClientModule", "fedopt.FedYogi"):
        assert any(f"fedsparse.{old}" in text for text in stored)
