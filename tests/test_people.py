"""What three people do from an empty folder with the installed wheel: what they type is here, and stands in a page."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest
from pages import blocks

from fedsparse.new import begin

pytestmark = pytest.mark.slow

IMAGES = [
    "python -m fedsparse.train data=imagefolder data.root=images model=timm model.name=test_vit model.pretrained=false "
    "federation.num_clients=4 federation.rounds=2 logger=csv hydra.run.dir=runs/images",
    "python -m fedsparse.report runs/images",
]
RULE = [
    "python -m fedsparse.new myproject",
    "cd myproject",
    "python -m unittest",
    "python -m fedsparse.train --config-dir conf experiment=mine",
    "python -m fedsparse.train --config-dir conf -m experiment=mine mask_rule=heaviest,random,dense seed=0,1,2 "
    "pictures=false hydra.sweep.dir=runs/rules",
    "python -m fedsparse.report runs/rules --out runs/report",
]
LANDSCAPE = [
    "python -m fedsparse.train model=mlp federation.rounds=5 logger=csv hydra.run.dir=runs/longer",
    "python -m fedsparse.train resume=runs/longer federation.rounds=10",
    "python -m fedsparse.landscape runs/longer grid=9 curvature=false",
]


def lines_in(page):
    """Commands of a page, without comments and with one space between words; a document is one command."""
    found = [block.text for block in blocks(page) if block.kind == "bash" and block.why is None]
    documents = [text.rstrip("\n") for text in found if "<<'END'" in text]
    lines = "".join(text for text in found if "<<'END'" not in text).replace("\\\n", " ").splitlines()
    return documents + [" ".join(line.partition("  #")[0].split()) for line in lines]


def missing(page, lines):
    return [line for line in lines if line not in lines_in(page)]


@pytest.fixture
def typed(venv, tmp_path, monkeypatch):
    """Type lines into one shell in an empty folder, where ``python`` has the wheel -> what they print."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", f"{venv.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def go(lines):
        done = subprocess.run(["bash", "-e"], input="\n".join(lines), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout

    return go


def summaries(folder):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).rglob("summary.json"))]


def test_own_images_with_a_model_of_timm(typed):
    """Bright and dark images: the page makes them, and a person has them already."""
    page = "docs/tutorials/own-images.md"
    (document,) = [text for text in lines_in(page) if "<<'END'" in text]
    lines = [document, *IMAGES]
    assert len(lines) < 10
    assert missing(page, lines) == []
    printed = typed(lines)
    (summary,) = summaries("runs/images")
    assert (summary["data"], summary["model"], summary["rounds"]) == ("imagefolder", "timm", 2)
    assert summary["test/acc"] == 1.0  # 20 images
    assert "100.0" in printed.split("# fedsparse report")[1]


def test_a_mask_rule_of_ones_own_against_two_others(typed, tmp_path):
    assert missing("docs/tutorials/own-rule.md", RULE) == []
    said = begin(tmp_path / "said")
    assert [any(line.startswith(command) for line in RULE) for command in said] == [True] * 3  # its README's commands
    typed(RULE)
    runs = summaries("myproject/runs/rules")
    assert sorted((run["mask_rule"], run["seed"]) for run in runs) == [
        (rule, seed) for rule in ("dense", "heaviest", "random") for seed in (0, 1, 2)
    ]
    with Path("myproject/runs/report/tables/results.csv").open(encoding="utf-8") as file:
        rows = {row["mask rule"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == ["dense", "heaviest", "random"]
    for rule, row in rows.items():
        accuracy = sum(run["test/acc"] for run in runs if run["mask_rule"] == rule) / 3
        assert float(row["test accuracy, %"]) == pytest.approx(100 * accuracy, abs=0.051)
    assert Path("myproject/runs/report/report.html").is_file()


@pytest.mark.soak
def test_the_landscape_of_a_run_that_was_resumed(typed):
    assert missing("docs/tutorials/landscapes.md", LANDSCAPE) == []
    typed(LANDSCAPE)
    (summary,) = summaries("runs/longer")
    drawn = json.loads(Path("runs/longer/landscape/landscape.json").read_text())
    assert (drawn["round"], drawn["global"]) == (summary["rounds"], summary["global_sha256"])
    assert summary["rounds"] == 10
