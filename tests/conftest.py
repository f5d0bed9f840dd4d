"""Shared by the tests: one thread, and runs in a folder of their own."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

torch.set_num_threads(1)

# a package that a run imports from a folder of its own, and a module that changes what is imported; no doctests here
collect_ignore = ["outside", "deploy/stand_ins", "conftest.py"]

# pictures take as long as the rest of such a run
FAST = ["model=mlp", "logger=csv", "federation.rounds=3", "calibration.head_steps=4", "pictures=false"]


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    """Run fast: ``run_in("name", "key=value", ...)`` -> (summary, run folder)."""
    from fedsparse import run

    monkeypatch.chdir(tmp_path)

    def go(name, *overrides, fast=True):
        folder = tmp_path / name
        return run([*(FAST if fast else []), f"hydra.run.dir={folder}", *overrides]), folder

    return go


@pytest.fixture(scope="session")
def fast_run(tmp_path_factory):
    """The summary of what ``run_in`` runs without options, made once."""
    from fedsparse import run

    place = tmp_path_factory.mktemp("fast")
    return run([*FAST, f"calibration.cache={place / 'cache'}", f"hydra.run.dir={place / 'run'}"])


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built once."""
    from wheels import build, copy_checkout

    return build(copy_checkout(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def venv(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel of this checkout, made once."""
    from wheels import environment

    return environment(wheel, tmp_path_factory.mktemp("venv"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """One finished run, for tests that copy it."""
    from sent import SHORT

    from fedsparse import run

    folder = tmp_path_factory.mktemp("sent") / "run"
    run([*SHORT, f"hydra.run.dir={folder}"])
    return folder


@pytest.fixture
def sent_folder(finished_run, tmp_path, monkeypatch):
    """A finished run, as if somebody had sent it."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished_run, tmp_path / "sent" / "run")
