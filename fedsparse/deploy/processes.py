"""Flower's commands as processes of ours: found beside this Python, kept quiet, and ended with all that they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NEEDED = "1.42"
EXTRA = "pip install 'fedsparse[flower]', in an environment of its own if other packages need protobuf 7 or rich 15"
PATIENCE = 10.0  # seconds for a process to end after SIGTERM
POLL = 0.05


def check_flower() -> None:
    """Refuse to go on without the version of Flower whose inside ``fedsparse.deploy.internals`` knows.

    Raises:
        ValueError: Flower is not installed, or is another version.

    """
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise ValueError(f"deployment needs Flower: {EXTRA}") from None
    if found.split(".")[:2] != NEEDED.split("."):
        raise ValueError(f"deployment needs flwr {NEEDED}, and {found} is installed: {EXTRA}")


def environment(home: Path) -> Mapping[str, str]:
    """Variables for a command of Flower: its files in a folder, no telemetry, no question for updates.

    Args:
        home: folder that Flower writes to instead of ``~/.flwr``.

    """
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return os.environ | quiet | {"FLWR_HOME": str(home.resolve()), "PATH": beside}


def ask(command: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of Flower to its end -> status and output; it is ended if a signal ends this process."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home),
        start_new_session=True,
    )
    with ended(process):
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def started(command: Sequence[str], home: Path, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and end it and all that it has started at the end of the ``with`` block.

    Args:
        command: what it runs.
        home: folder of Flower's files.
        log: file to which its output is appended; by default it is printed.

    """
    with open(log or os.devnull, "ab") as file:
        to = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
        process = subprocess.Popen(command, env=environment(home), start_new_session=True, **to)  # type: ignore
    with ended(process):
        yield process


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """End a process and all that it has started, by their ids, at the end of the ``with`` block."""
    try:
        yield
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:  # a second Ctrl-C waits, or it would leave processes behind
            _end(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it has started: by SIGTERM, which they may answer, then by SIGKILL."""
    pids = below(process.pid)
    if process.poll() is None:
        process.terminate()
    waited(lambda: process.poll() is not None, PATIENCE)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in filter(alive, [process.pid, *pids]):
            os.kill(pid, number)
        waited(lambda: process.poll() is not None and not any(map(alive, pids)), PATIENCE / 2)


def waited(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most so long -> whether it holds."""
    end = time.monotonic() + seconds
    while not (holds := done()) and time.monotonic() < end:
        time.sleep(POLL)
    return holds


def alive(pid: int) -> bool:
    """Whether a process is there, and not only as an entry that its parent has not read."""
    status = Path("/proc") / str(pid) / "stat"
    try:
        os.kill(pid, 0)
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, PermissionError, FileNotFoundError):
        return False


def below(pid: int) -> Sequence[int]:
    """Ids of all processes that a process has started, and these, and so on."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = defaultdict(list)
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children[parent].append(child)
    found, open_ = [], list(children[pid])
    while open_:
        found.append(open_.pop())
        open_ += children[found[-1]]
    return found
