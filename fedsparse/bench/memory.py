"""Peak resident memory of this process, and of those that it started, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch.nn import functional as F

from fedsparse.bench.problems import Task

PROC = Path("/proc")
T = TypeVar("T")


def resident(field: str, pid: str = "self") -> int:
    """Bytes of a field of a process's status, such as ``VmRSS`` (resident now) or ``VmHWM`` (its peak); 0 if absent."""
    lines = (PROC / pid / "status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def forget_peak() -> None:
    """Set the peak to what is resident now."""
    (PROC / "self" / "clear_refs").write_text("5", encoding="utf-8")


def grown(work: Callable[[], T]) -> tuple[T, int | None]:
    """Do some work -> its result, and by how many bytes the peak exceeded what was resident before.

    None where the kernel does not tell (no ``/proc``).
    """
    give_back()
    try:
        forget_peak()
        before = resident("VmRSS")
    except OSError:
        return work(), None
    return work(), resident("VmHWM") - before


def warm(task: Task) -> None:
    """Step a network once and give the memory back, so that what torch loads at its first step counts for nobody."""
    net, (x, y) = task.net().train(), task.batches(0)[0][0]
    F.cross_entropy(net(x), y).backward()
    del net
    give_back()


def give_back() -> None:
    """Give memory that nobody uses back to the system, so that who takes some next is seen to take it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library: it keeps what it keeps, for all runners alike
        return


def descendants() -> int:
    """Sum the peaks of all processes below this one, in bytes, without the files and segments that they share."""
    return sum(_own(pid) for pid in _below(resident_pid()))


def resident_pid() -> str:
    """Number of this process."""
    return (PROC / "self").resolve().name


def _own(pid: str) -> int:
    """Peak of a process less what it shares; 0 if it has ended meanwhile."""
    try:
        return max(0, resident("VmHWM", pid) - resident("RssFile", pid) - resident("RssShmem", pid))
    except OSError:
        return 0


def _below(top: str) -> list[str]:
    """Numbers of all processes that descend from one."""
    parents = {p.name: _parent(p) for p in PROC.iterdir() if p.name.isdigit()}
    found, rest = [], [top]
    while rest:
        here = rest.pop()
        children = [pid for pid, parent in parents.items() if parent == here]
        found += children
        rest += children
    return found


def _parent(folder: Path) -> str:
    """Number of a process's parent, from the fields after its name, which may hold blanks and parentheses."""
    try:
        return (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
    except OSError:
        return ""
