"""How a command ends: each signal that asks for it is one line and an exit status, and a lost terminal ends nothing."""

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

# what a cluster sends, to every process of a run or to one, before it takes a machine away
CLUSTER = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
# what a terminal sends, to all processes of the command: Ctrl-C, and that it is closed
TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
TERMINATED = 128 + signal.SIGTERM
DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(SystemExit):
    """A signal asks this process to end.

    Args:
        number: the signal.
        said: whether a line has said so.

    """

    def __init__(self, number: int, said: bool = False) -> None:
        super().__init__(number, said)
        self.number, self.said = signal.Signals(number), said
        self.code = 128 + number if number in TERMINAL else TERMINATED


def stopped(number: int, frame: Any = None) -> None:
    """Handle a signal: end what is going on."""
    raise Stopped(number)


@contextmanager
def heeded() -> Iterator[None]:
    """Let signals raise ``Stopped`` that would end the process without a word.

    Those that are ignored stay so (nohup, a shell's background job), and those that someone else handles are theirs.
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
    """Carry out what a person typed: a signal is one line, and output that nobody reads any more is dropped."""
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
    """Put a stream in place of a standard one that outlives its reader, such as ``| head -1`` or a closed terminal."""
    old = getattr(sys, name)
    if not isinstance(old, io.TextIOWrapper) or old is not getattr(sys, f"__{name}__"):
        return  # a test or a notebook reads it
    old.flush()
    options: dict[str, Any] = {"encoding": old.encoding, "errors": old.errors, "line_buffering": True}
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(_Outlet(old.fileno(), "w", closefd=False)), **options))


class _Outlet(io.FileIO):
    """A descriptor that turns to nowhere when nobody reads it any more."""

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
