"""How time and memory grow, on small cases."""

from __future__ import annotations

import json

import pytest

from fedsparse.bench import processes, scale
from fedsparse.bench.scale import Case, measure


def test_a_case_is_measured(tmp_path):
    found = measure(Case(20, 4, rounds=1), tmp_path)
    assert found["weights"] == 64 * 128 + 128 + 128 * 10 + 10
    assert found["kept_mb"] == 0
    assert found["client_ms"] == pytest.approx(250 * found["round_s"], rel=0.05, abs=1)


def test_what_clients_keep_is_in_a_file(tmp_path):
    found = measure(Case(20, 20, feedback=True, rounds=1), tmp_path)
    assert found["kept_mb"] >= round(20 * 9610 * 4 / 1e6, 1)  # a row of each client


def test_a_width_gives_the_weights(tmp_path):
    assert measure(Case(2, 1, hidden=30, rounds=1), tmp_path)["weights"] == 64 * 30 + 30 + 30 * 30 + 30 + 300 + 10


def test_every_case_is_a_line_of_a_process(monkeypatch, capsys):
    asked = []

    def figures(python, module, arguments, threads):
        asked.append((module, *arguments))
        return {"case": arguments[-1]}

    monkeypatch.setattr(processes, "figures", figures)
    scale.main([])
    assert [json.loads(line)["case"] for line in capsys.readouterr().out.splitlines()] == list(scale.CASES)
    assert asked[0] == ("fedsparse.bench.scale", "--here", "--only", "100 of 1,000 clients")


def test_an_unknown_case_is_one_line():
    with pytest.raises(SystemExit, match="invalid choice: 'many'"):
        scale.main(["--only", "many"])
