"""Every notebook runs from top to bottom, and is stored without its outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_it_is_stored_without_outputs(path):
    assert read(path)["nbformat"] == 4
    assert code_cells(path)
    for cell in code_cells(path):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@every_notebook
def test_it_runs(path, tmp_path):
    script = tmp_path / f"{path.stem}_cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells(path)) + "\n", encoding="utf-8")
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
