"""The wheel of this checkout, built without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def call(command, cwd, **env):
    """Run to the end -> standard output; what the command said is in the failure."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(target):
    """Copy what a wheel is built from: setuptools leaves build/ and *.egg-info beside it."""
    for name in ("fedsparse", "conf", "docs/template"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target)
    readme = ROOT / "README.md"
    (target / "README.md").write_text(readme.read_text(encoding="utf-8") if readme.exists() else "", encoding="utf-8")
    return target


def build(source, wheels):
    """Build the wheel of a copy of the checkout into a folder -> its file."""
    call([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels, source], wheels)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def environment(wheel, folder):
    """Make an environment with the wheel alone, behind which the packages of this one are found -> its interpreter."""
    call([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin" / "python"
    call([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], folder, PYTHONPATH="")
    (site,) = folder.glob("lib/python*/site-packages")
    others = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "others.pth").write_text("\n".join(others) + "\n")  # read last: this folder's own fedsparse comes first
    return python
