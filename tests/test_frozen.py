"""Runs keep their bits. On a machine whose arithmetic rounds otherwise, figures agree and bytes are equal."""

from __future__ import annotations

import json

import pytest
from frozen import HERE, RUNS, canary, names, result

KEPT = json.loads(HERE.read_text(encoding="utf-8"))
SAME_BITS = KEPT["canary"] == canary()
COUNTS = ("bytes_", "round", "client_steps", "dropped_updates", "phase")


def test_every_run_is_kept():
    assert set(KEPT["runs"]) == set(names())
    assert len(RUNS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_run_keeps_its_bits(name, tmp_path):
    found, kept = result(name, tmp_path / "run"), KEPT["runs"][name]
    if SAME_BITS:
        assert found == kept
        return
    assert found["bytes_total"] == kept["bytes_total"]
    for row, old in zip(found["rows"], kept["rows"], strict=True):
        assert row.keys() == old.keys()
        for key, value in row.items():
            exact = key.startswith(COUNTS)
            assert value == old[key] if exact else value == pytest.approx(old[key], rel=0.02, abs=0.02), key


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("resumed: ")])
def test_a_resumed_run_ends_as_one_that_went_through(name):
    resumed, whole = KEPT["runs"][name], KEPT["runs"][name.removeprefix("resumed: ")]
    assert resumed["row"] == whole["row"]
    assert resumed["bytes_total"] == whole["bytes_total"]
