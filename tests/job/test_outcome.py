"""What a program gets from a run: figures as a dict, and its model, mask and metrics; and from a sweep, a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from omegaconf import OmegaConf
from safetensors.torch import load_file

from fedsparse import Outcome, Outcomes, run, sweep
from fedsparse.job.config import FreshRunFolder
from fedsparse.job.outcome import typed

FAST = {
    "model": "mlp",
    "logger": "csv",
    "pictures": False,
    "federation": {"rounds": 2, "num_clients": 4},
    "calibration": {"head_steps": 1},
}


def test_keywords_run_as_what_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(mask_rule="random", **FAST, hydra={"run": {"dir": "named folder"}})
    assert found == json.loads((tmp_path / "named folder/summary.json").read_text()) | {"folder": found["folder"]}
    assert found.folder.samefile(tmp_path / "named folder")
    weights = load_file(found.folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model().items())
    assert found.mask().density == pytest.approx(0.2, abs=0.2)
    assert list(found.metrics()["round"]) == [1, 2]
    as_typed = ["mask_rule=random", "model=mlp", "logger=csv", "pictures=false", "federation.rounds=2"]
    other = run([*as_typed, "federation.num_clients=4", "calibration.head_steps=1", "hydra.run.dir=typed"])
    assert other["global_sha256"] == found["global_sha256"]


def test_a_keyword_counts_after_what_is_typed_and_a_typo_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="sede") as error:
        run(["model=mlp"], sede=3)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="federation.rounds is 0"):
        run(["federation.rounds=2"], federation={"rounds": 0})


def test_values_are_written_as_hydra_reads_them():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    keys = {"a": None, "b": [True, 1.5, "x y", None], "c": "it's {1}", "d": "", "e": {"f": "runs/a b", "g": 1e-9}}
    read = {o.get_key_element(): o.value() for o in OverridesParser.create().parse_overrides(list(typed(keys)))}
    assert read == {
        "a": None,
        "b": [True, 1.5, "x y", None],
        "c": "it's {1}",
        "d": "",
        "e.f": "runs/a b",
        "e.g": 1e-9,
    }


@pytest.mark.slow
def test_a_sweep_is_a_multirun_and_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = {**FAST, "hydra": {"sweep": {"dir": "my grid"}}}
    found = sweep(["mask_rule=random,dense"], sparsity=["s50"], **keys)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("2 cells in my grid", "report: python -m fedsparse.report 'my grid'")
    assert [(row["mask_rule"], row["sparsity"]) for row in found] == [("random", "s50"), ("dense", "s50")]
    parts = "calibration.head_steps-1+federation.num_clients-4+mask_rule-{}+model-mlp+sparsity-s50"
    assert [row.folder.relative_to(tmp_path) for row in found] == [
        Path("my grid", parts.format(rule)) for rule in ("random", "dense")
    ]
    for row in found:
        stored = json.loads((row.folder / "summary.json").read_text())
        assert row == stored | {"sparsity": "s50", "folder": str(row.folder)}
    as_one = run(mask_rule="random", sparsity="s50", **FAST)
    assert as_one["global_sha256"] == found[0]["global_sha256"] != found[1]["global_sha256"]
    monkeypatch.setattr("fedsparse.job.execute.assemble", lambda _: pytest.fail("built what is finished"))
    again = sweep(sparsity=["s50"], mask_rule=["dense", "random"], **keys)
    assert sorted(again, key=str) == sorted(found, key=str)
    assert again.swept == ("sparsity", "mask_rule")
    assert list(found.frame()["test/acc"]) == [row["test/acc"] for row in found]


@pytest.fixture
def workers():
    """What ends joblib's processes, which wait for more work and hold a gigabyte."""
    yield
    get_reusable_executor().shutdown(wait=True)


@pytest.mark.slow
def test_cells_side_by_side_are_the_same_and_the_report_is_said_once(workers, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = sweep(mask_rule="random", seed=[0, 1], **FAST, jobs=2)
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == f"report: python -m fedsparse.report {found[0].folder.parent.relative_to(tmp_path)}"
    assert sum(line.startswith("report:") for line in lines) == 1
    assert found[1]["global_sha256"] == run(mask_rule="random", seed=1, **FAST)["global_sha256"]
    assert "report:" not in capfd.readouterr().out


def test_only_a_sweep_with_a_finished_run_has_a_report(tmp_path, capsys):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    FreshRunFolder().on_multirun_end(config)  # as of calibrations
    assert capsys.readouterr().out == ""
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell/summary.json").touch()
    FreshRunFolder().on_multirun_end(config)
    assert capsys.readouterr().out == f"report: python -m fedsparse.report {tmp_path}\n"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"mask_rule": ["random", "rnd"]}, "there is no mask_rule=rnd; did you mean mask_rule=random"),
        ({"seed": [0, 1], "optimizer": {"lr": [0.1, -1]}}, "optimizer.lr is -1; it must be"),
        ({"sede": [0]}, "there is no key sede; did you mean seed"),
        ({"seed": []}, r"seed=\[\]: a sweep needs at least one value"),
        ({"resume": "runs/a"}, "resume=runs/a: a sweep from Python"),
        ({"jobs": 0}, "jobs is 0; it must be a whole number of 1 or more"),
    ],
)
def test_a_mistake_in_any_cell_is_one_line_before_anything_runs(keys, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{why}") as error:
        sweep(**keys)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_table_of_runs_is_printed_in_columns_and_needs_pandas_for_a_frame(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    figures = {"bytes_total": 16_400, "seconds": 6.04, "test/acc": 0.9754}
    rows = [
        Outcome({"optimizer.lr": 0.1, **figures, "folder": str(tmp_path / "a")}),
        Outcome({"optimizer.lr": 1e-05, **figures, "personal/acc_mean": 0.5, "folder": "/b"}),
    ]
    assert str(Outcomes(rows, ["optimizer.lr"])).splitlines() == [
        "optimizer.lr  personal/acc_mean  test/acc  bytes_total  seconds  folder",
        "         0.1                        97.5%      16.4 kB      6.0  a",
        "       1e-05              50.0%     97.5%      16.4 kB      6.0  /b",
    ]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"^frame\(\) needs pandas: pip install pandas"):
        Outcomes(rows, []).frame()
