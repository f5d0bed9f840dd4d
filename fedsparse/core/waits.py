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
    from rich.status import Status

log = logging.getLogger("fedsparse")
_shown: list[tuple[str, Status]] = []  # the spinner of this process's terminal; one at most


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

        with Console(file=sys.stderr).status(what) as status:
            _shown.append((what, status))
            try:
                yield
            finally:
                _shown.clear()
    log.info("%s: %.1f s", what, time.perf_counter() - began)


def progress(detail: str) -> None:
    """Add to the spinner how far it is, such as ``client 3/10``; nothing where none is shown."""
    for what, status in _shown:
        status.update(f"{what}: {detail}")


def may_download(what: str) -> None:
    """Say in a line what is downloaded, or may be; the spinner ends, since downloads have bars of their own.

    Of several processes the first one says it.
    """
    for _, status in _shown:
        status.stop()
    if os.environ.get("RANK", "0") == "0":
        print(f"fedsparse: {what}", file=sys.stderr, flush=True)
