"""Runs a runner in a process of its own, by the Python of its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedsparse
from fedsparse.bench.peers import PEERS

ENVIRONMENTS = Path(".peers")
LONGEST = 3600  # seconds, after which a runner hangs rather than computes


def installed(folder: Path) -> dict[str, Path]:
    """Find the peers whose environments exist in a folder: name -> Python."""
    pythons = {name: (folder / name / "bin" / "python").absolute() for name in PEERS}
    return {name: python for name, python in pythons.items() if python.is_file()}


def figures(python: Path | str, module: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a module that prints a JSON object as its last line of that kind -> the object.

    Args:
        python: the interpreter.
        module: what it runs.
        arguments: of its command line.
        threads: that torch may use.

    Raises:
        RuntimeError: it failed, took too long or printed none; with its last line of complaint.

    """
    command = [str(python), "-m", module, *arguments, "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=_environment(threads))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took longer than {LONGEST} s") from None
    if done.returncode:
        raise RuntimeError(_last(done.stderr) or f"it ended with status {done.returncode}")
    return _object(done.stdout)


def memory(python: Path | str, module: str, arguments: Sequence[str], threads: int) -> int | None:
    """Run a few rounds -> growth of peak memory in bytes, or None where nothing tells it."""
    return figures(python, module, arguments, threads)["memory"]


def alone(runner: str, model: str, cohort: int, threads: int) -> int | None:
    """Memory of a runner of this environment; see ``memory``."""
    return memory(sys.executable, "fedsparse.bench.alone", [runner, model, "--cohort", str(cohort)], threads)


def _environment(threads: int) -> Mapping[str, str]:
    """Let the process find this fedsparse, and hold its libraries to the threads."""
    root, paths = str(Path(fedsparse.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")
    own = [] if root == sysconfig.get_path("purelib") else [root]  # an environment of a peer has that behind its own
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return os.environ | limits | {"PYTHONPATH": os.pathsep.join([*own, *filter(None, [paths])])}


def _object(text: str) -> dict[str, Any]:
    """Last line of a text that is a JSON object; runners may talk before and after."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    raise RuntimeError("it printed no figures")


def _last(text: str) -> str:
    """Last line of a text that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
