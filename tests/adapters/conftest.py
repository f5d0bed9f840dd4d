"""Finished runs with adapters, made once, and the command typed."""

from __future__ import annotations

import os
import shutil
import sys
import warnings

import pytest
from adapter_runs import DEPARTMENTS, trained


@pytest.fixture(scope="session")
def departments(tmp_path_factory):
    """FedSA in two departments, two rounds: its folder and summary."""
    pytest.importorskip("peft", reason="peft is in the extra lora")
    folder = tmp_path_factory.mktemp("departments") / "run"
    return folder, trained(folder, *DEPARTMENTS)


@pytest.fixture
def folder(departments, tmp_path):
    """A copy of that run."""
    return shutil.copytree(departments[0], tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys):
    """Type arguments -> exit code, output, errors."""
    from fedsparse.adapters import __main__

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def typed(*arguments):
        monkeypatch.setitem(os.environ, "HYDRA_FULL_ERROR", "0")  # a command sets it
        monkeypatch.setattr(sys, "argv", ["fedsparse.adapters", *map(str, arguments)])
        code = 0
        try:
            __main__.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return typed
