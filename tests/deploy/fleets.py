"""Commands of ``fedsparse.deploy`` in an environment that has Flower, which the one of the tests has not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsparse.deploy.joining import free_port
from fedsparse.deploy.processes import alive, below

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("FEDSPARSE_FLOWER_PYTHON", ROOT / ".peers" / "flwr" / "bin" / "python"))
HERE = Path(__file__).parent
needs_flower = pytest.mark.skipif(not PYTHON.is_file(), reason="no .peers/flwr: make .peers/flwr/.ready")
LONGEST = 120


class Commands:
    """Types commands, with stand-ins or as they are.

    ``call`` runs one to its end; ``running`` keeps one within a ``with`` block, and sees to it that none is left.
    """

    def __init__(self, folder, stand_ins=True):
        paths = [ROOT, *([HERE, HERE / "stand_ins"] if stand_ins else [])]
        own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HYDRA_FULL_ERROR": "0"}
        self.folder, self.env = folder, os.environ | own
        self.started = 0

    def call(self, *arguments, module="fedsparse.deploy"):
        command = [PYTHON, "-m", module, *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=LONGEST)

    @contextmanager
    def running(self, *arguments, line, number=signal.SIGTERM):
        """Start a command and wait for a line -> the process and the file of what it says; a signal ends it."""
        self.started += 1
        log = self.folder / f"{arguments[0]}-{self.started}.log"
        with log.open("w") as file:
            command = [PYTHON, "-m", "fedsparse.deploy", *map(str, arguments)]
            process = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=file, stderr=file)
        try:
            wait_for(lambda: line in log.read_text() or process.poll() is not None)
            assert line in log.read_text(), log.read_text()
            yield process, log
        finally:
            pids = below(process.pid)
            if process.poll() is None:
                process.send_signal(number)
            process.wait(LONGEST)
            left = [pid for pid in pids if alive(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            assert not left, f"processes left: {left}"


def wait_for(done, longest=LONGEST):
    """Wait until something holds."""
    end = time.monotonic() + longest
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


__all__ = ["HERE", "PYTHON", "ROOT", "Commands", "free_port", "needs_flower", "wait_for"]
