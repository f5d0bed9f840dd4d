"""Signals that end a command: each gives one line and an exit status; a closed terminal or pipe ends nothing."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# sent by a cluster, to every process of a run or to one, before it takes a machine away
CLUSTER = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
# sent by a terminal to all processes of the command: by Ctrl-C, and when it is closed
TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
TERMINATED = 128 + signal.SIGTERM
DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(SystemExit):
    """A signal has ended this process.

    Args:
        number: of the signal.
        said: whether the line about it is printed already.

    """

    def __init__(self, number: int, said: bool = False) -> None:
        super().__init__(number, said)
        self.number, self.said = signal.Signals(number), said
        self.code = 128 + number if number in TERMINAL else TERMINATED


def stopped(number: int, frame: Any = None) -> None:
    """Handle a signal: raise ``Stopped``."""
    raise Stopped(number)


@contextmanager
def heeded() -> Iterator[None]:
    """Raise ``Stopped`` for signals with a default handler, within a ``with`` block in the main thread.

    Signals that are ignored (nohup, a shell's background job) or have another handler keep theirs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = {number: signal.getsignal(number) for number in [*CLUSTER, *TERMINAL]}
    taken = {number: handler for number, handler in taken.items() if handler in DEFAULT}
    for number in taken:
        signal.signal(number, stopped)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextmanager
def command() -> Iterator[None]:
    """Run a command line: a signal prints one line and sets the exit status; output to a closed pipe is dropped."""
    for name in ("stdout", "stderr"):
        _outlive(name)
    try:
        with heeded():
            yield
    except (KeyboardInterrupt, Stopped) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if not stop.said:
            print(f"fedsparse: {stop.number.name}: stopped before the end", file=sys.stderr)
        sys.exit(stop.code)


def _outlive(name: str) -> None:
    """Replace a standard stream by one that survives a closed reader, such as ``| head -1`` or a terminal."""
    old = getattr(sys, name)
    if not isinstance(old, io.TextIOWrapper) or old is not getattr(sys, f"__{name}__"):
        return  # replaced already, by a test or a notebook
    old.flush()
    options: dict[str, Any] = {"encoding": old.encoding, "errors": old.errors, "line_buffering": True}
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(_Outlet(old.fileno(), "w", closefd=False)), **options))


class _Outlet(io.FileIO):
    """A file descriptor that is redirected to the null device when its reader is closed."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
