"""The benchmark compares like with like; the report chooses by validation and computes its intervals rightly."""

from __future__ import annotations

import json
import math

import pytest
from scipy import stats

from fedsparse import bench, report
from fedsparse.analysis.table import markdown, read_runs, rows


@pytest.mark.parametrize("setting", [bench.BARE, bench.UNVALIDATED])
def test_both_loops_end_at_the_same_weights(tmp_path, setting):
    result = bench.measure(bench.PROBLEMS["mlp"], 2, 1, setting, tmp_path)
    assert result.weights_differ < 1e-6
    assert result.ratio_min <= result.ratio <= result.ratio_max
    assert result.hand_ms > 0
    assert (tmp_path / "metrics.csv").is_file()


def a_run(folder, rule, lr, seed, val, test, trainable="all"):
    folder.mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / ".hydra/config.yaml").write_text(f"optimizer: {{lr: {lr}}}\nmodel: {{trainable: {trainable}}}\n")
    figures = {"val/acc": val, "test/acc": test, "client/acc_worst10": test - 0.1, "trainable_fraction": 0.2}
    summary = {"mask_rule": rule, "partition": "iid", "seed": seed, "bytes_up": 2_500_000, **figures}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    """Two learning rates: 0.1 validates better, 0.3 tests better; the table must take 0.1."""
    for seed, (val, test) in enumerate([(0.90, 0.80), (0.92, 0.84), (0.94, 0.88)]):
        a_run(tmp_path / f"a{seed}", "random", 0.1, seed, val, test)
        a_run(tmp_path / f"b{seed}", "random", 0.3, seed, val - 0.05, test + 0.1)
    a_run(tmp_path / "head", "dense", 0.1, 0, 0.5, 0.4, trainable="head")
    return tmp_path


def test_a_row_takes_the_learning_rate_that_validates_best(sweep):
    table = {row.name: row for row in rows(read_runs([sweep]))}
    row = table["random"]
    assert (row.lr, row.runs, row.lr_at_edge) == (0.1, 3, True)
    assert row.test.mean == pytest.approx(0.84)
    low, high = stats.t.interval(0.95, df=2, loc=0.84, scale=0.04 / math.sqrt(3))  # standard deviation 0.04 by hand
    assert (row.test.mean - row.test.half, row.test.mean + row.test.half) == pytest.approx((low, high))
    assert table["dense, trainable=head"].runs == 1


def test_the_table_as_a_person_reads_it(sweep, capsys):
    report.main([str(sweep)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| random | iid | 0.1* | 20.0% | 2.5 | 84.0 ± 9.9 | 74.0 ± 9.9 | 3 |"
    assert lines[3] == "| dense, trainable=head | iid | 0.1 | 20.0% | 2.5 | 40.0 | 30.0 | 1 |"
    assert markdown(rows(read_runs([sweep]))) == "\n".join(lines[:4])


def test_no_runs_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        report.main([str(tmp_path)])
