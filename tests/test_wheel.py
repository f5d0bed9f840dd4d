"""The wheel is whole: installed elsewhere, away from the checkout, it trains."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
DATA = {".py", ".yaml", ".safetensors", ".typed", ".json"}
SHORT = ["logger=csv", "federation.rounds=1"]


def call(command, cwd, **env):
    """Run to the end -> standard output; what the command said is in the failure."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(target):
    """Copy what a wheel is built from: setuptools leaves build/ and *.egg-info beside it."""
    for name in ("fedsparse", "conf"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target)
    readme = ROOT / "README.md"
    (target / "README.md").write_text(readme.read_text(encoding="utf-8") if readme.exists() else "", encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel without network, and install it alone into an empty folder -> that folder."""
    source = copy_checkout(tmp_path_factory.mktemp("source"))
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    call([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels, source], wheels)
    (wheel,) = wheels.glob("*.whl")
    call([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], wheels)
    return target


@pytest.fixture
def python(installed, tmp_path):
    """Run the interpreter in an empty folder with the installed wheel -> standard output.

    ``-S`` leaves out the .pth files of site-packages, and with them the finder of an editable install; the other
    packages are found because their folder stands on PYTHONPATH, where no .pth file is read. ``-P`` leaves out the
    current folder.
    """
    others = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    path = os.pathsep.join([str(installed), *others])

    def go(*arguments):
        return call([sys.executable, "-S", "-P", *arguments], tmp_path, PYTHONPATH=path)

    return go


def files(folder):
    """Name and fingerprint of every file that a wheel is to carry."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix in DATA and "__pycache__" not in p.parts]
    return {str(p): hashlib.sha256((folder / p).read_bytes()).hexdigest() for p in found}


def test_it_holds_every_module_every_yaml_and_the_weights(installed):
    package = installed / "fedsparse"
    conf = files(package / "conf")
    code = {name: sha for name, sha in files(package).items() if not name.startswith("conf" + os.sep)}
    assert conf == files(ROOT / "conf")
    assert code == files(ROOT / "fedsparse")
    assert any(name.endswith("vit_digits.safetensors") for name in code)
    assert (package / "models" / "weights" / "bert_tiny" / "vocab.txt").is_file()
    assert {p.name.partition("-")[0] for p in installed.iterdir()} == {"fedsparse"}


def test_the_checkout_is_out_of_sight(installed, python):
    code = "import fedsparse, fedsparse.job.shipped as c; print(fedsparse.__file__); print(c.conf_dir())"
    assert python("-c", code).split() == [
        str(installed / "fedsparse" / "__init__.py"),
        str(installed / "fedsparse" / "conf"),
    ]


@pytest.mark.parametrize("model", ["mlp", "vit_digits"])
def test_it_trains(python, tmp_path, model):
    python("-m", "fedsparse.train", f"model={model}", "mask_rule=random", "partition=noniid_nc1", *SHORT)
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    figures = json.loads(summary.read_text())
    assert (figures["rounds"], figures["mask_rule"], figures["partition"]) == (1, "random", "noniid_nc1")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_sweep_makes_two_runs(python, tmp_path):
    python("-m", "fedsparse.train", "-m", "mask_rule=random,dense", "model=mlp", *SHORT)
    summaries = [json.loads(p.read_text()) for p in sorted((tmp_path / "runs").rglob("summary.json"))]
    assert [summary["mask_rule"] for summary in summaries] == ["dense", "random"]  # folders are named after the rule
