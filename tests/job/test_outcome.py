"""What a program gets from a run: figures as a dict, and its model, mask and metrics."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fedsparse import run
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
