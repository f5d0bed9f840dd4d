"""What the device does in a round: kernels, copies, and the gaps between them."""

from __future__ import annotations

import collections
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.profiler import ProfilerActivity, profile

from fedsparse.bench.gpu.device import sync
from fedsparse.bench.gpu.session import Figures

Event = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Profile(lightning.Callback):
    """Profiles one round.

    Args:
        round: which, from 0.

    Attributes:
        events: of the trace, as Chrome reads it.
        seconds: of the round, under the profiler.

    """

    def __init__(self, round: int) -> None:
        self.round, self.began, self.seconds = round, 0.0, 0.0
        on_device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *on_device])
        self.open = ExitStack()
        self.events: list[Event] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin, if this is the round."""
        if trainer.current_epoch == self.round:
            self.open.enter_context(self.profiler)
            sync(pl_module.device)
            self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End, and read the trace."""
        if trainer.current_epoch == self.round:
            sync(pl_module.device)
            self.seconds = time.perf_counter() - self.began
            self.open.close()
            self.events = _trace(self.profiler)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """End, whatever happened."""
        self.open.close()

    def figures(self) -> Figures:
        """Describe the round."""
        return {"seconds_under_profiler": round(self.seconds, 4), **described(self.events)}


def _trace(profiler: profile) -> list[Event]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def described(events: Sequence[Event]) -> Figures:
    """Sum up a trace: the device's events, or a CPU's operators where there are none."""
    found = [e for e in events if e.get("cat") in ON_DEVICE]
    found = found or [e for e in events if e.get("cat") == "cpu_op" and e.get("ph") == "X"]
    busy, gaps = busy_and_gaps((e["ts"], e["ts"] + e["dur"]) for e in found)
    calls = collections.Counter(e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {
        "device_events": len(found),
        "busy_share": round(busy / max(busy + sum(gaps), 1e-9), 3),
        "gap_ms": round(sum(gaps) / 1e3, 2),
        "gaps_over_50us": sum(gap > 50 for gap in gaps),
        "longest_gaps_ms": [round(gap / 1e3, 2) for gap in sorted(gaps)[-5:]],
        "top15": _longest(found, 15),
        "copies": dict(collections.Counter(e["name"] for e in found if e.get("cat") == "gpu_memcpy")),
        "runtime_calls": dict(calls.most_common(8)),
    }


def busy_and_gaps(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """Time that spans cover together, and the gaps between them.

    >>> busy_and_gaps([(4.0, 6.0), (0.0, 2.0), (1.0, 3.0)])
    (5.0, [1.0])
    """
    busy, gaps, end = 0.0, list[float](), float("-inf")
    for start, stop in sorted(spans):
        if start > end > float("-inf"):
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, gaps


def _longest(events: Iterable[Event], most: int) -> list[tuple[str, int, float]]:
    """Kernels that take longest together: name, how often, milliseconds."""
    durations = collections.defaultdict[str, list[float]](list)
    for event in events:
        durations[_short(event["name"])].append(event["dur"] / 1e3)
    found = sorted(((name, len(took), round(sum(took), 3)) for name, took in durations.items()), key=lambda k: -k[2])
    return found[:most]


def _short(name: str) -> str:
    """Leave out the arguments of a template, but of torch's own kernels, whose names they are."""
    return name[:110] if name.startswith("void at::native") else name.split("<")[0][-70:]
