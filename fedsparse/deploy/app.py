"""The app that Flower packs and sends: two names of ``fedsparse.deploy``, and the configuration of the run."""

from __future__ import annotations

import json
from pathlib import Path

from fedsparse import __version__
from fedsparse.deploy.processes import NEEDED

PACKAGE = "fedsparse_app"
LICENSE = "Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedsparse-run"
version = "{version}"
description = "A run of fedsparse"
license = {{ file = "LICENSE" }}
dependencies = ["flwr=={needed}.*"]

[tool.flwr.app]
publisher = "fedsparse"

[tool.flwr.app.components]
serverapp = "{package}.server:server"
clientapp = "{package}.client:client"

[tool.flwr.app.config]
config = {config}
folder = {folder}
resume = {resume}
"""
# Flower reads the modules without running them, and wants to see an assignment
MODULE = "from fedsparse.deploy.{name}_app import {name} as made\n\n{name} = made\n"


def write(app: Path, config: str, folder: Path, resume: bool) -> None:
    """Write the folder of an app.

    Args:
        app: folder to write.
        config: YAML of the composed configuration.
        folder: of the run, on the server's machine.
        resume: whether the run goes on from what that folder holds.

    """
    values = {"config": _toml(config), "folder": _toml(str(folder.resolve())), "resume": str(resume).lower()}
    (app / PACKAGE).mkdir(parents=True)
    (app / "LICENSE").write_text(LICENSE, encoding="utf-8")
    (app / PACKAGE / "__init__.py").write_text("", encoding="utf-8")
    for name in ("server", "client"):
        (app / PACKAGE / f"{name}.py").write_text(MODULE.format(name=name), encoding="utf-8")
    project = PROJECT.format(version=__version__, needed=NEEDED, package=PACKAGE, **values)
    (app / "pyproject.toml").write_text(project, encoding="utf-8")


def _toml(text: str) -> str:
    """Write a string in TOML's form, which is JSON's but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
