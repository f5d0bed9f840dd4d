"""Runs of ``python -m fedsparse.train``, several at a time, each in a group of processes of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import fedsparse
from fedsparse.core.folder import METRICS
from fedsparse.core.rows import read_rows

TRAIN = (sys.executable, "-m", "fedsparse.train")
LEAST = 30.0  # seconds of the budget that no run may enter: they are stopped, and the rest begins
PAUSE = 0.05


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        name: of the run and its folder.
        device: ``cuda`` or ``cpu``.
        overrides: of the configuration.
        killed: whether it is killed after its first round, and resumed.

    """

    name: str
    device: str
    overrides: tuple[str, ...] = ()
    killed: bool = False

    def arguments(self, folder: Path) -> list[str]:
        """Write the arguments of the command that starts it."""
        accelerator = "gpu" if self.device == "cuda" else "cpu"
        fixed = ["logger=csv", "pictures=false", "calibration.cache=null", f"hydra.run.dir={folder / self.name}"]
        return [f"trainer.accelerator={accelerator}", *fixed, *self.overrides]


class Runs:
    """Makes runs below a folder, and ends those that are under way when it is left.

    Args:
        folder: of the runs; a log lies beside each.
        threads: of each run.
        most: that run at a time.
        left: seconds of the budget that are left.
        train: the command that makes a run.

    Attributes:
        codes: exit status of each run that ended; a killed one's is that of its second half.
        kills: rounds that were closed when a run was killed.

    """

    def __init__(
        self, folder: Path, threads: int, most: int, left: Callable[[], float], train: Sequence[str] = TRAIN
    ) -> None:
        self.folder, self.most, self.left, self.train = folder, most, left, train
        self.environment = environment(folder, threads)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.codes: dict[str, int] = {}
        self.kills: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Begin with no run under way."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is under way."""
        for name in list(self.running):
            self._kill(name)

    def make(self, jobs: Iterable[Job]) -> None:
        """Make runs, in this order, until all have ended or the budget has."""
        waiting = list(jobs)
        to_kill = {job.name for job in waiting if job.killed}
        while (waiting or self.running) and self.left() > LEAST:
            while waiting and len(self.running) < self.most:
                job = waiting.pop(0)
                self._start(job.name, job.arguments(self.folder))
            for name in to_kill & self.running.keys() - self.kills.keys():
                self._interrupt(name)
            self._collect()
            time.sleep(PAUSE)

    def said(self, name: str) -> list[str]:
        """Last lines of a run's log."""
        text = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-3:]

    def _start(self, name: str, arguments: list[str]) -> None:
        command = [*self.train, *arguments]
        with (self.folder / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _interrupt(self, name: str) -> None:
        """Kill a run that has closed a round, and resume it."""
        table = self.folder / name / METRICS
        closed = len(read_rows(table)) if table.exists() else 0
        if closed and self.running[name].poll() is None:
            self._kill(name)
            self.kills[name] = closed
            self._start(name, [f"resume={self.folder / name}"])

    def _collect(self) -> None:
        """Note which runs have ended."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                self.codes[name] = process.returncode
                del self.running[name]

    def _kill(self, name: str) -> None:
        process = self.running.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the group that was started with it
            process.wait()


def environment(folder: Path, threads: int) -> Mapping[str, str]:
    """Let runs find this fedsparse, hold them to some threads, and let them do without wandb where there is none.

    Without ``logger=wandb`` a run asks for ``wandb.run`` when it fails, and for nothing else.
    """
    paths = [str(Path(fedsparse.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("wandb") is None:
        stub = folder / "stub" / "wandb.py"
        stub.parent.mkdir(exist_ok=True)
        stub.write_text("run = None\n", encoding="utf-8")
        paths.append(str(stub.parent))
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), "HYDRA_FULL_ERROR": "1"}
    own["PYTHONUNBUFFERED"] = "1"  # what a run printed stands before the error that ended it
    return {"WANDB_MODE": "offline", **os.environ, **own}
