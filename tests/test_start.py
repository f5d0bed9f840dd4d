"""What a command imports before it knows that it is needed: by counts of modules, not by seconds."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from composed import composed

from fedsparse.core.absent import absent
from fedsparse.core.launch import launched
from fedsparse.job.config import check

PACKAGE = Path(__file__).parent.parent / "fedsparse"
OPTIONAL = {"matplotlib", "pandas", "peft", "scipy", "sklearn", "timm", "transformers", "wandb"}
HEAVY = {"lightning", "numpy", "torch", "torchmetrics", "torchvision", *OPTIONAL}
BENCHES = ("bench.__main__", "bench.gpu.__main__")
LIGHT = ("adapters.__main__", *BENCHES, "calibrate", "export", "landscape.__main__", "new", "repeat", "report", "train")


def at_the_top(body):
    """Statements that run when a module is imported; not what a type checker alone reads."""
    for node in body:
        if isinstance(node, ast.If):
            yield from at_the_top(node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node.body)
        elif isinstance(node, ast.Try):
            yield from at_the_top(node.body)
        else:
            yield node


def graph():
    """Modules of the package, and what each imports when it is imported."""
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = defaultdict(set)
    for name, path in paths.items():
        for node in at_the_top(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name].update({one for one in full if one in paths} | {node.module})
    return found


GRAPH = graph()


def loaded(start):
    """Libraries that importing a module imports, with all that it imports of the package."""
    seen, waiting = set(), [start]
    while waiting:
        parts = waiting.pop().split(".")
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]  # a package's __init__ runs first
        waiting += [other for name in names if name not in seen for other in GRAPH.get(name, ())]
        seen.update(names)
    return {name.split(".")[0] for name in seen}


@pytest.mark.parametrize("command", [*LIGHT, "studies.landscapes"])
def test_a_command_is_read_without_torch(command):
    assert loaded(f"fedsparse.{command}") & HEAVY == set()


def test_a_run_imports_what_its_parts_need():
    assert loaded("fedsparse.job.execute") & HEAVY == HEAVY - OPTIONAL


def test_a_library_is_found_through_other_modules():
    assert {"timm", "torch"} <= loaded("fedsparse.bench.collect")
    assert "matplotlib" in loaded("fedsparse.analysis.curves")


def call(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:], done.stderr.splitlines()


REFUSED = {
    "train federation.round=3": "there is no key federation.round; did you mean federation.rounds?",
    "train +seeds=3": "there is no key seeds; did you mean",
    "train federation.rounds=-3": "federation.rounds is -3; it must be a whole number of 1 or more",
    "train trainer.precision=16": "trainer.precision is 16; write trainer.precision=16-mixed",
    "train mask_rule=nonsense": "there is no mask_rule=nonsense; ",
    "calibrate optimizer.lr=0": "optimizer.lr is 0; it must be a finite number above 0",
    "export folder=x": "folder=x: give run=<run folder>",
    "landscape.__main__ runs/x grid=two": "grid is 'two'; it must be a whole number of 3 or more",
    "adapters.__main__ runs/x mend": "argument list|export|merge|evaluate|answer: invalid choice: 'mend'",
    "bench.__main__ --models nope": "argument --models: invalid choice: 'nope'",
    "bench.gpu.__main__ --only nope": "argument --only: invalid choice: 'nope'",
}
HELPED = (*BENCHES, "landscape.__main__", "repeat", "report", "train")
SHOWN = ("train --cfg job", *(f"{command} --help" for command in HELPED))
COMMANDS = """
import os, runpy, sys
for command in {}:
    os.environ.pop("HYDRA_FULL_ERROR", None)  # the command before has set it
    module, *sys.argv[1:] = command.split()
    try:
        runpy.run_module("fedsparse." + module, run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):  # as the interpreter says it
            print(error.code, file=sys.stderr)
print("modules", *sys.modules)
"""


@pytest.mark.slow
def test_help_and_mistakes_of_the_configuration_need_no_torch(tmp_path):
    modules, errors = call(COMMANDS.format([*SHOWN, *REFUSED]), tmp_path)
    assert len(errors) == len(REFUSED)
    for error, why in zip(errors, REFUSED.values(), strict=True):
        assert error.startswith(f"fedsparse: {why}")
    assert HEAVY & set(modules) <= {"numpy"}  # by joblib and by sweepers of Hydra, which --help lists
    assert list(tmp_path.rglob("*.log")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("model", "more"), [("mlp", set()), ("vit_digits", {"timm"})])
def test_a_small_run_imports_no_library_that_it_does_not_use(model, more, tmp_path):
    options = f"model={model} mask_rule=random logger=csv pictures=false federation.rounds=1 hydra.run.dir=a"
    modules, _ = call(COMMANDS.format([f"train {options}"]), tmp_path)
    assert (tmp_path / "a" / "summary.json").is_file()
    # scikit-learn, which imports pandas and scipy, made the digits' split, which is kept
    assert HEAVY & set(modules) == {"lightning", "numpy", "torch", "torchmetrics", "torchvision"} | more


def test_absent_packages_are_neither_imported_nor_have_a_version():
    before = list(sys.meta_path)
    with absent("build", "json"):
        with pytest.raises(ModuleNotFoundError, match="No module named 'build'"):
            importlib.import_module("build")
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("build")
        assert importlib.import_module("json") is json  # it was imported before
    assert sys.meta_path == before
    assert importlib.metadata.version("build")


def test_packages_are_back_after_an_error():
    before = list(sys.meta_path)
    with pytest.raises(KeyError), absent("build"):
        raise KeyError
    assert sys.meta_path == before


@pytest.mark.parametrize(("override", "guarded"), [("seed=1", True), ("mask_rule._target_=collections.Counter", False)])
def test_ones_own_code_has_all_of_torchmetrics(monkeypatch, override, guarded):
    calls = []
    monkeypatch.setattr("fedsparse.job.lean.import_torchmetrics", lambda: calls.append(1))
    check(composed(override))
    assert calls == [1] * guarded


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"SLURM_NTASKS": "1"}, True),
    ],
)
def test_processes_that_others_start_are_found_in_the_environment(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() is expected
