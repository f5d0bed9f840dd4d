"""The best of a sweep repeated with more seeds."""

from __future__ import annotations

import json

import pytest

from fedsparse import repeat, run

pytestmark = pytest.mark.slow

FAST = ["model=mlp", "logger=csv", "calibration.head_steps=2", "pictures=false"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """One seed of two rules at two learning rates; which validates better is written into the summaries by hand."""
    monkeypatch.chdir(tmp_path)
    best = {"random": "0.3", "dense": "0.1"}
    for rule in best:
        for lr in ("0.1", "0.3"):
            folder = tmp_path / "grid" / f"{rule}-{lr}"
            run(
                [
                    *FAST,
                    "federation.rounds=1",
                    f"mask_rule={rule}",
                    f"optimizer.lr={lr}",
                    "seed=0",
                    f"hydra.run.dir={folder}",
                ]
            )
            path = folder / "summary.json"
            figures = json.loads(path.read_text()) | {"val/acc": 0.9 if best[rule] == lr else 0.8}
            path.write_text(json.dumps(figures))
    return tmp_path / "grid"


def finished(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/summary.json")}


def test_each_row_is_repeated_at_its_best_rate_and_then_skipped(sweep, capsys, tmp_path):
    before = finished(sweep)
    repeat.main([str(sweep), "--seeds", "1", "2"])
    new = {name: summary for name, summary in finished(sweep).items() if name not in before}
    assert set(new) == {
        f"calibration.head_steps-2+mask_rule-{rule}+model-mlp+optimizer.lr-{lr}+seed-{seed}"
        for rule, lr in (("random", "0.3"), ("dense", "0.1"))
        for seed in (1, 2)
    }
    alone = run(
        [
            *FAST,
            "federation.rounds=1",
            "mask_rule=random",
            "optimizer.lr=0.3",
            "seed=2",
            f"hydra.run.dir={tmp_path / 'alone'}",
        ]
    )
    assert alone["global_sha256"] in {summary["global_sha256"] for summary in new.values()}
    capsys.readouterr()
    repeat.main([str(sweep), "--seeds", "1", "2"])
    assert capsys.readouterr().out.count("is finished") == 4


def test_a_folder_without_runs_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        repeat.main([str(tmp_path), "--seeds", "1"])


def test_keys_that_the_sweep_went_over_make_cells_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rounds in ("1", "2"):
        run([*FAST, f"federation.rounds={rounds}", "seed=0", f"hydra.run.dir=grid/{rounds}"])
    names = [folder.name for _, folder in repeat.cells(tmp_path / "grid", [1])]
    assert sorted(names) == [
        f"calibration.head_steps-2+federation.rounds-{rounds}+model-mlp+seed-1" for rounds in ("1", "2")
    ]
