"""The mutation tool on a package of a few lines, with strong tests and weak ones."""

from __future__ import annotations

import ast
import subprocess

import pytest
from mutation import run
from mutation.__main__ import main
from mutation.mutants import mutants, sample
from mutation.tree import read_explanations

TOY = '''"""What is tested well, weakly, in a child and not at all."""

import os

LIMIT = 10


def strong(x: int | None) -> bool:
    return x < LIMIT


def weak(x):
    return x + 1


def ends(x):
    while x > 0:
        x -= 1
    return x


def child(x):
    return x * 2


def untested(x):
    return not x


def stays(x):
    if x:
        os._exit(0)
    return True
'''
TESTS = """import subprocess
import sys

import pytest
from toy.numbers import ends, stays, strong, weak


@pytest.mark.parametrize(("x", "wanted"), [(9, True), (10, False), (11, False)])
def test_strong(x, wanted):
    assert strong(x) is wanted


def test_weak():
    assert weak(0) is not None


def test_ends():
    assert ends(3) == 0


def test_stays():
    assert stays(False)


def test_child():
    subprocess.run([sys.executable, "-c", "from toy.numbers import child; assert child(3) == 6"], check=True)


def test_fails_anyhow():
    assert weak(0) == strong(0) == ends(0) == "nothing"
"""
PROJECT = """[tool.mutate]
core = ["toy/numbers.py"]
explained = "explained.txt"
goal = 0.7
patience = 1

[tool.pytest.ini_options]
testpaths = ["tests"]
"""
EXPLAINED = """# why some are not noticed
toy/numbers.py weak: return x + 1 -> return x - 1
    nobody minds
"""


@pytest.fixture
def toy(tmp_path):
    for name, text in {
        "toy/__init__.py": "",
        "toy/numbers.py": TOY,
        "tests/test_numbers.py": TESTS,
        "pyproject.toml": PROJECT,
        "explained.txt": EXPLAINED,
        ".gitignore": ".mutation/\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.soak
@pytest.mark.slow
def test_a_strong_test_notices_and_a_weak_one_does_not(toy, capsys, monkeypatch):
    """Noticed: two of 10, two of <, seven of the loop (three never end), three of the child, an exit and a False."""
    assert main(["--root", str(toy), "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out, it fails without a mutant: tests/test_numbers.py::test_fails_anyhow"
    assert sorted(lines[1:-1]) == [
        "    nobody minds",
        "not noticed: toy/numbers.py weak: return x + 1 -> return x + 0  (line 13)",
        "not noticed: toy/numbers.py weak: return x + 1 -> return x + 2  (line 13)",
        "not noticed: toy/numbers.py weak: return x + 1 -> return x - 1  (line 13)",
        "run by no test: toy/numbers.py stays: os._exit(0) -> os._exit(1)  (line 32)",
        "run by no test: toy/numbers.py stays: os._exit(0) -> pass  (line 32)",
        "run by no test: toy/numbers.py untested: return not x -> return x  (line 27)",
    ]
    assert lines[-1] == (
        "22 mutants: 16 noticed (72.7%), 6 not (1 explained, 0 met the cap); at least 70% are to be noticed"
    )
    assert (toy / "toy/numbers.py").read_text() == TOY

    def refuse(folder, preload, lock):
        lock.close()
        raise AssertionError("nothing is known of these files")

    monkeypatch.setattr(run, "Worker", refuse)  # what is known is not judged again
    assert main(["--root", str(toy)]) == 0
    assert capsys.readouterr().out.splitlines() == lines[1:]
    (toy / "pyproject.toml").write_text(PROJECT.replace("0.7", "0.8"))
    with pytest.raises(AssertionError, match="nothing is known"):
        main(["--root", str(toy)])


@pytest.mark.slow
def test_some_lines_by_some_tests(toy, capsys):
    tests = ["--tests", "tests/test_numbers.py"]
    (toy / "tests/test_numbers.py").write_text(TESTS.partition("def test_fails")[0])
    assert main(["--root", str(toy), "--jobs", "1", "--at", "toy/numbers.py:13", *tests]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 mutants: 0 noticed (0.0%), 3 not (1 explained")
    assert main(["--root", str(toy), "--jobs", "1", "--at", "toy/numbers.py:9", *tests]) == 0


SOURCE = '''"""Module."""
import torch

__all__ = ["f"]


class A:
    """A 1 + 1 of words."""

    size: int = 3

    @property
    def f(self, x: int | None = None, *, flag: bool = False) -> int | None:
        if flag and not x is None:
            raise ValueError(f"{x + 1} is not 2")
        for i in range(4):
            if i:
                break
        self.y = torch.zeros(2, dtype=torch.float32)
        return -self.y.sum() if x not in (1.0, "a") else x
'''
WANTED = {
    "size: int = 3": {"size: int = 4", "size: int = 2"},
    "def f(self, x: int | None = None, *, flag: bool = False) -> int | None:": {
        "def f(self, x: int | None = None, *, flag: bool = True) -> int | None:"
    },
    "if flag and not x is None:": {
        "if flag or not x is None:",
        "if flag and x is None:",
        "if flag and not x is not None:",
    },
    'raise ValueError(f"{x + 1} is not 2")': {"pass"},
    "for i in range(4):": {"for i in range(5):", "for i in range(3):"},
    "if i:": {"if not i:"},
    "break": {"continue"},
    "self.y = torch.zeros(2, dtype=torch.float32)": {
        "pass",
        "self.y = torch.ones(2, dtype=torch.float32)",
        "self.y = torch.zeros(3, dtype=torch.float32)",
        "self.y = torch.zeros(1, dtype=torch.float32)",
        "self.y = torch.zeros(2, dtype=torch.float64)",
    },
    'return -self.y.sum() if x not in (1.0, "a") else x': {
        'return self.y.sum() if x not in (1.0, "a") else x',
        'return -self.y.mean() if x not in (1.0, "a") else x',
        'return -self.y.sum() if x in (1.0, "a") else x',
        'return -self.y.sum() if x not in (2.0, "a") else x',
        'return -self.y.sum() if x not in (0.0, "a") else x',
    },
}


def test_mutants_of_a_source_by_hand():
    """No annotation, decorator, message or docstring; each is one change that still is Python."""
    found, all_of_them = {}, mutants("a.py", SOURCE)
    for mutant in all_of_them:
        found.setdefault(mutant.before, set()).add(mutant.after)
        ast.parse(mutant.apply(SOURCE))
        assert SOURCE.splitlines()[mutant.line - 1].split() == mutant.before.split()
    assert found == WANTED
    assert len({mutant.key for mutant in all_of_them}) == len(all_of_them)
    assert {mutant.function for mutant in all_of_them} == {"A", "A.f"}


def test_fewer_are_a_part_of_more_and_an_edit_elsewhere_changes_no_name():
    all_of_them = mutants("a.py", SOURCE)
    few, more = ([m.key for m in sample(all_of_them, number, 3)] for number in (4, 9))
    assert few == more[:4]
    assert few != [m.key for m in sample(all_of_them, 4, 4)]
    longer = mutants("a.py", SOURCE.replace("import torch", "import math\nimport torch"))
    assert [m.key for m in longer] == [m.key for m in all_of_them]
    assert [m.line for m in longer] == [m.line + 1 for m in all_of_them]


def test_a_key_without_a_reason_is_refused(tmp_path):
    path = tmp_path / "explained.txt"
    path.write_text("a.py f: x -> y\n    because\n\nb.py g: x -> y\nc.py h: x -> y\n    why\n")
    with pytest.raises(ValueError, match="no reason follows 'b.py g: x -> y'"):
        read_explanations(path)
    assert read_explanations(tmp_path / "none.txt") == {}
