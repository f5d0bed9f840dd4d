"""What a command waits for: a spinner or, where it is counted, a bar on a terminal; a line where one may download."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

WIDTH = 30  # characters of a bar
log = logging.getLogger("fedsparse")
_shown: list[Progress] = []  # the spinner of this process's terminal; one at most


@contextmanager
def waiting(what: str, shared: bool = False, passes: int | None = None) -> Iterator[None]:
    """Show what is waited for within a ``with`` block, and log its seconds.

    Args:
        what: such as ``calibration``.
        shared: whether other runs write to the same terminal at the same time; nothing is shown then.
        passes: how often ``advance`` counts from 1 to its end; the bar pulses until it is called. None: no bar.

    """
    began = time.perf_counter()
    if shared or _shown or not sys.stderr.isatty():
        yield
    else:
        from rich.console import Console  # here, since a command line that is refused waits for nothing
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"))
        counted = () if passes is None else (BarColumn(WIDTH), TextColumn("{task.fields[at]}"))
        console = Console(file=sys.stderr)
        # what is printed goes above the spinner if it goes to the same terminal; a pipe gets it as ever
        redirected = sys.stdout.isatty()
        with Progress(*columns, *counted, console=console, transient=True, redirect_stdout=redirected) as shown:
            shown.add_task(what, total=None, passes=passes or 1, at="")
            _shown.append(shown)
            try:
                yield
            finally:
                _shown.clear()
    log.info("%s: %.1f s", what, time.perf_counter() - began)


def advance(place: int, of: int) -> None:
    """Count ``place`` of ``of`` in one pass, such as the third of ten clients; nothing where no bar is shown."""
    for shown in _shown:
        (task,) = shown.tasks
        passes = task.fields["passes"]
        done = min(passes, round(task.completed + 1 / of, 6))  # a tenth ten times is one
        at = f"{place}/{of}" if passes == 1 else f"{done:.0f}/{passes:.0f}"
        shown.update(task.id, total=passes, completed=done, at=at)


def may_download(what: str) -> None:
    """Say in a line what is downloaded, or may be; the spinner ends, since downloads have bars of their own.

    Of several processes the first one says it.
    """
    for shown in _shown:
        shown.stop()
    if os.environ.get("RANK", "0") == "0":
        print(f"fedsparse: {what}", file=sys.stderr, flush=True)
