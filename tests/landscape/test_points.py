"""Points of a surface in several processes, and through a spline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from landscapes import drawn, surface

from fedsparse.landscape import points

FAST = ("data=[test]", "models=[global]")


@pytest.mark.slow  # it starts processes
def test_processes_change_nothing_beyond_rounding(folder):
    drawn(folder, "grid=7", *FAST)
    here = surface(folder)
    (folder / "landscape" / "surface_test.npz").unlink()
    drawn(folder, "grid=7", "processes=2", *FAST)
    shared = surface(folder)
    assert here.keys() == shared.keys()
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(shared[name], here[name], rtol=1e-5, atol=1 / 300)
    assert str(shared["key"]) == str(here["key"])


@pytest.mark.slow  # it starts processes
def test_a_process_that_ends_is_an_error_of_one_line(folder, monkeypatch):
    start = points.Team.start

    def ended(team):
        end = start(team)
        end.send_bytes(b"no pickle")
        return end

    monkeypatch.setattr(points.Team, "start", ended)
    with pytest.raises(RuntimeError, match="a process that evaluates points ended; set processes=1 to see why"):
        drawn(folder, "grid=7", "processes=2", *FAST)


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow  # it starts three processes
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the processes from /proc")
def test_the_processes_of_a_killed_command_end(folder):
    typed = [str(folder), "grid=401", "processes=2", "curvature=false", *FAST]
    command = subprocess.Popen([sys.executable, "-m", "fedsparse.landscape", *typed], stdout=subprocess.DEVNULL)
    part, limit = folder / "landscape", time.monotonic() + 120
    while not any(part.glob("*.part")) and time.monotonic() < limit:
        time.sleep(0.1)
    team = children(command.pid)
    assert len([pid for pid in team if alive(pid)]) >= 2
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    while any(map(alive, team)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(alive, team))


def test_a_spline_errs_no_more_than_it_says(folder):
    drawn(folder, "grid=41", *FAST)
    whole = surface(folder)
    assert whole["evaluated"] == 41**2
    assert whole["errors"].tolist() == [0, 0]
    figures = drawn(folder, "grid=41", "refine=true", *FAST)["surface test"]
    found = surface(folder)
    assert figures["evaluated"] == found["evaluated"] == 40 + 11**2
    assert figures["points"] == 41**2
    assert found["errors"][0] <= 0.01
    for name, error in zip(("loss", "accuracy"), found["errors"], strict=True):
        span = np.ptp(whole[name])
        # 40 held-out points do not find the largest error of 1681; twice theirs, and what rounding is of the range
        assert np.abs(found[name] - whole[name]).max() <= 2 * error * span + 1e-3 * span
    np.testing.assert_array_equal(found["a"], whole["a"])
    assert not list((folder / "landscape").glob("*.part"))


def test_a_tolerance_that_no_spline_keeps_evaluates_every_point(folder):
    figures = drawn(folder, "grid=13", "refine=true", "tolerance=1.0e-9", *FAST)["surface test"]
    assert figures["errors"] == [0, 0]
    assert figures["evaluated"] == 40 + 11**2 + 13**2
    refined = surface(folder)["loss"]
    drawn(folder, "grid=13", *FAST)
    np.testing.assert_allclose(refined, surface(folder)["loss"], rtol=1e-5)


def test_a_spline_through_a_plane_of_models_has_both_axes(folder):
    """Axes of different ends: the models' own points are where their losses are."""
    drawn(folder, "plane=models", "grid=31", "refine=true", "data=[test]", "models=[global,0,1]")
    found = surface(folder)
    assert (found["a"][0], found["a"][-1]) != (found["b"][0], found["b"][-1])
    drawn(folder, "plane=models", "grid=31", "data=[test]", "models=[global,0,1]")
    span = np.ptp(surface(folder)["loss"])
    assert np.abs(found["loss"] - surface(folder)["loss"]).max() <= 0.03 * span
