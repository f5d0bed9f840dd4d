"""What a figure depends on beside the code: the machine, and how busy it was."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from fedsparse import __version__


def describe(threads: int) -> dict[str, Any]:
    """Describe the machine; ``load_start`` is its load average over the last minute."""
    import torch  # here, so that a command line is read without it

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fedsparse": __version__,
        "load_start": load(),
    }


def load() -> float | None:
    """Load average over the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
