"""What a command waits for: a spinner on a terminal, and a line where something may be downloaded."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner

log = logging.getLogger("fedsparse")
_shown: list[tuple[str, Live, Spinner]] = []  # the spinner of this process's terminal; one at most


@contextmanager
def waiting(what: str, shared: bool = False) -> Iterator[None]:
    """Show what is waited for within a ``with`` block, and log its seconds.

    Args:
        what: such as ``calibration``.
        shared: whether other runs write to the same terminal at the same time; nothing is shown then.

    """
    began = time.perf_counter()
    if shared or _shown or not sys.stderr.isatty():
        yield
    else:
        from rich.console import Console  # here, since a command line that is refused waits for nothing
        from rich.live import Live
        from rich.spinner import Spinner

        spinner, console = Spinner("dots", what, style="status.spinner"), Console(file=sys.stderr)
        # what is printed goes above the spinner if it goes to the same terminal; a pipe gets it as ever
        with Live(spinner, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as live:
            _shown.append((what, live, spinner))
            try:
                yield
            finally:
                _shown.clear()
    log.info("%s: %.1f s", what, time.perf_counter() - began)


def progress(detail: str) -> None:
    """Add to the spinner how far it is, such as ``client 3/10``; nothing where none is shown."""
    for what, _, spinner in _shown:
        spinner.update(text=f"{what}: {detail}")


def may_download(what: str) -> None:
    """Say in a line what is downloaded, or may be; the spinner ends, since downloads have bars of their own.

    Of several processes the first one says it.
    """
    for _, live, _ in _shown:
        live.stop()
    if os.environ.get("RANK", "0") == "0":
        print(f"fedsparse: {what}", file=sys.stderr, flush=True)
