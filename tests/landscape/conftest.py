"""A finished run of two rounds, made once for all tests of landscapes."""

from __future__ import annotations

import shutil

import pytest

from fedsparse import run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run, and its summary."""
    folder = tmp_path_factory.mktemp("landscape") / "run"
    options = [
        "model=mlp",
        "logger=csv",
        "pictures=false",
        "federation.rounds=2",
        "calibration.head_steps=4",
        "trajectory=global",
    ]
    return folder, run([*options, "trajectory=global", f"hydra.run.dir={folder}"])


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of the run, without pictures: those have a test of their own."""
    monkeypatch.setattr("fedsparse.landscape.drawing.draw", lambda *_: [])
    return shutil.copytree(made[0], tmp_path / "run")
