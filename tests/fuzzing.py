"""Fuzz: many attempts in a child process of bounded memory; a signal, a traceback or a hang names the attempt.

CI makes a tenth of the attempts, by fixed seed; ``make fuzz`` makes all (``FEDSPARSE_FUZZ=full``).
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = resource.getpagesize()


def attempts(full: int) -> int:
    """How many attempts are made: all with ``make fuzz``, a tenth elsewhere."""
    return full if os.environ.get("FEDSPARSE_FUZZ") == "full" else full // 10


def hammer(
    attempt: Callable[[int], str],
    number: int,
    *,
    refusals: tuple[type[BaseException], ...] = (ValueError,),
    megabytes: int = 256,
    seconds: float = 900.0,
) -> Counter[str]:
    """Make attempts 0 to ``number`` - 1 in a forked child; count how they ended.

    Args:
        attempt: takes its number and returns a word for how it ended, or raises a refusal; what must not happen it
            asserts.
        number: of attempts.
        refusals: exceptions that are a right answer; their text must be one line, and is not empty.
        megabytes: address space that the child may take beyond what it begins with; more is a MemoryError.
        seconds: for all attempts.

    Returns:
        How many ended with which word, and ``refused``.

    """
    at = mmap.mmap(-1, 8)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as told:
        child = os.fork()
        if child == 0:
            _serve(attempt, number, refusals, megabytes, at, Path(told.name))
        status = _wait(child, seconds)
        (reached,) = struct.unpack("q", at[:8])
        if status is None:
            pytest.fail(f"attempt {reached}: still at work after {seconds} s in all")
        if os.WIFSIGNALED(status):
            pytest.fail(f"attempt {reached}: {signal.Signals(os.WTERMSIG(status)).name}")
        text = told.read()
    if os.WEXITSTATUS(status):
        pytest.fail(f"attempt {reached}: {text}")
    return Counter(json.loads(text))


def _serve(attempt, number, refusals, megabytes, at, told) -> None:  # in the child; never returns
    code = 1
    try:
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20,) * 2)
        ended: Counter[str] = Counter()
        for index in range(number):
            at[:8] = struct.pack("q", index)
            try:
                ended[attempt(index)] += 1
            except refusals as error:
                _check_line(error)
                ended["refused"] += 1
        told.write_text(json.dumps(ended), encoding="utf-8")
        code = 0
    except BaseException:
        told.write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(code)


def _check_line(error: BaseException) -> None:
    line = str(error)
    assert line.strip(), f"a {type(error).__name__} without a word"
    assert "\n" not in line, f"not one line: {line!r}"


def _wait(child: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
