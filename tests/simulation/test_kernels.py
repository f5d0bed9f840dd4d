"""The kernels of a run: what the keys switch is on while it lasts, preparation included, and as before afterwards."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsparse.simulation.devices import kernels


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize(
    ("deterministic", "tf32", "inside"),
    [
        (False, False, (False, False, "highest")),
        (True, False, (True, False, "highest")),
        ("warn", False, (True, True, "highest")),
        (False, True, (False, False, "high")),
    ],
)
def test_the_switches_are_on_inside_and_restored_after_a_failure(deterministic, tf32, inside):
    seen = []

    def fail():
        with kernels(deterministic, tf32):
            seen.append(switches())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [inside]
    assert switches() == (False, False, "highest")


def test_a_run_prepares_and_trains_with_them(run_in, monkeypatch):
    seen = []
    real = torch.nn.functional.cross_entropy

    def noted(*arguments, **options):
        seen.append(switches())
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", noted)
    run_in("run", "trainer.deterministic=true", "federation.tf32=true", "federation.rounds=1", "calibration.cache=null")
    assert set(seen) == {(True, False, "high")}
    assert switches() == (False, False, "highest")


def test_the_peak_of_memory_is_the_systems_in_bytes(run_in):
    summary, _ = run_in("run", "federation.rounds=1", "calibration.cache=null")
    pages = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", pages)[1])
    assert 0.8 * peak < summary["peak_memory"] <= peak
    assert summary["peak_memory_gpu"] is None


def test_channels_that_lie_last_give_the_same_results_but_for_rounding(run_in, tmp_path):
    drawn = np.random.default_rng(0)
    for part, samples in (("train", 60), ("val", 20), ("test", 20)):
        x, y = drawn.standard_normal((samples, 3, 16, 16), dtype=np.float32), np.arange(samples) % 2
        np.savez(tmp_path / f"{part}.npz", x=x, y=y)
    options = [
        "data=arrays",
        "data.root=.",
        "model=conv",
        "model.cohort=1",
        "mask_rule=dense",
        "federation.num_clients=2",
    ]
    seen = {}
    for last in (False, True):
        summary, folder = run_in(f"last{last}", *options, "federation.rounds=1", f"federation.channels_last={last}")
        seen[last] = load_file(folder / "model.safetensors"), summary["val/loss"]
    rows = [torch.cat([tensor.flatten() for tensor in tensors.values()]) for tensors, _ in seen.values()]
    assert not torch.equal(*rows)  # other kernels
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)
    assert seen[True][1] == pytest.approx(seen[False][1], rel=1e-4)
