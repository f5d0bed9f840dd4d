"""The wheel is whole: installed elsewhere, away from the checkout, it trains."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig

import pytest
from wheels import PIP, ROOT, call

pytestmark = pytest.mark.slow

DATA = {".py", ".yaml", ".safetensors", ".typed", ".json"}
BESIDE = {"conf": "conf", "template": "docs/template"}  # of the package in the wheel, and their places in the checkout
SHORT = ["logger=csv", "federation.rounds=1"]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel alone into an empty folder -> that folder."""
    target = tmp_path_factory.mktemp("target")
    call([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], target)
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
    code = {name: sha for name, sha in files(package).items() if name.split(os.sep)[0] not in BESIDE}
    assert code == files(ROOT / "fedsparse")
    for name, place in BESIDE.items():
        assert files(package / name) == files(ROOT / place)
    assert any(name.endswith("vit_digits.safetensors") for name in code)
    assert (package / "models" / "weights" / "bert_tiny" / "vocab.txt").is_file()
    assert (package / "template" / "README.md").is_file()
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
