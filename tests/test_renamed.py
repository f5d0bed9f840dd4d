"""Commands of version 0.1 go on under their old names, for one release, and say the new one."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedsparse

FOLDER = Path(fedsparse.__file__).parent / "renamed"
OLD = {"attack", "correlations", "pretrain", "pretrain_text", "savings", "text_baselines"}


def test_every_command_that_had_another_name_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.py")} == OLD | {"__init__"}


@pytest.mark.parametrize("old", sorted(OLD))
def test_an_old_name_stands_for_a_command_that_there_is(old):
    assert Path(find_spec(f"fedsparse.{old}").origin) == FOLDER / f"{old}.py"
    tree = ast.parse((FOLDER / f"{old}.py").read_text())
    (home,) = [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.names[0].name == "main"]
    assert callable(import_module(home).main)
    (said,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "renamed"]
    assert [arg.value for arg in said.args] == [old, home.removeprefix("fedsparse.")]


@pytest.mark.slow
def test_an_old_name_says_the_new_one_and_is_carried_out():
    done = subprocess.run([sys.executable, "-m", "fedsparse.attack", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "fedsparse: python -m fedsparse.attack is python -m fedsparse.studies.attack now\n"
    assert "usage:" in done.stdout
