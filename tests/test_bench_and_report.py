"""The benchmark compares like with like."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsparse import bench


@pytest.mark.parametrize("setting", [bench.BARE, bench.UNVALIDATED])
def test_both_loops_end_at_the_same_weights(tmp_path, setting):
    result = bench.measure(replace(bench.PROBLEMS["mlp"], pairs=2, warmup=1), setting, tmp_path)
    assert result.weights_differ < 1e-6
    assert result.ratio_min <= result.ratio <= result.ratio_max
    assert result.hand_ms > 0
    assert (tmp_path / "metrics.csv").is_file()
