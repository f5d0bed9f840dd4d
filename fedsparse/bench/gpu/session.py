"""Where the checks run, how long they may, and what they say: one JSON object a line."""

from __future__ import annotations

import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedsparse.bench.gpu.device import release

Figures = dict[str, Any]
MARGIN = 1.25  # a check may take so much longer than the longest of its kind


class OutOfTime(Exception):
    """A check was cut short before it had a figure."""


class Session:
    """Carries checks out, one after the other, while time is left.

    Args:
        device: where they run.
        tiny: whether sizes are small, for a CPU.
        budget: seconds from now on.
        out: folder of ``results.jsonl``, or None for no file.

    Attributes:
        failed: names of the checks that failed.

    """

    def __init__(
        self, device: torch.device, tiny: bool = False, budget: float = math.inf, out: Path | None = None
    ) -> None:
        self.device, self.tiny, self.budget = device, tiny, budget
        self.file = None if out is None else out / "results.jsonl"
        self.began = time.perf_counter()
        self.failed: list[str] = []
        self.longest: dict[str, float] = {}

    def passed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def left(self) -> float:
        """Seconds that are left."""
        return self.budget - self.passed()

    def say(self, check: str, **figures: Any) -> None:
        """Print a line, and write it to the file."""
        line = json.dumps({"check": check, "at_s": round(self.passed(), 1), **figures}, default=str)
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if "failed" in figures:
            self.failed.append(check)

    def attempt(self, check: str, needs: float, run: Callable[[], Figures], kind: str | None = None) -> Figures | None:
        """Carry out a check, and say its figures; or that there is no time for it, or what went wrong.

        Args:
            check: its name.
            needs: seconds, a guess at full size.
            run: measures.
            kind: of checks that take about as long: once one has run, the longest of them replaces the guess.

        Returns:
            The figures, or None.

        """
        needs = self.longest.get(kind or check, 0.1 * needs if self.tiny else needs)
        if self.left() < needs:
            self.say(check, skipped=f"{max(0.0, self.left()):.0f} s left, {needs:.0f} needed")
            return None
        began = self.passed()
        try:
            figures = run()
        except OutOfTime as error:
            self.say(check, skipped=str(error))
        except Exception as error:
            self.say(check, **reason(error))
        else:
            took = self.passed() - began
            self.longest[kind or check] = max(MARGIN * took, self.longest.get(kind or check, 0.0))
            self.say(check, **figures, took_s=round(took, 1))
            return figures
        finally:
            release(self.device)
        return None


def reason(error: Exception) -> Figures:
    """Say what went wrong, and where: the last frames."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return {
        "failed": f"{type(error).__name__}: {str(error)[:400]}",
        "frames": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
    }


def ms(seconds: Sequence[float]) -> float | None:
    """Median in milliseconds, if there is any.

    >>> ms([0.001, 0.002, 0.4]), ms([])
    (2.0, None)
    """
    return round(1e3 * statistics.median(seconds), 2) if seconds else None
