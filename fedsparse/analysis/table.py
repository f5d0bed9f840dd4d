"""A table of many runs: the best learning rate of each row by validation, means over seeds, and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Estimate from independent values; half is NaN for a single one.

        >>> Interval.of([0.9, 0.92, 0.94]).half  # doctest: +ELLIPSIS
        0.0496...
        """
        n = len(values)
        spread = float(np.std(values, ddof=1)) if n > 1 else math.nan
        return cls(float(np.mean(values)), float(stats.t.ppf(0.975, max(1, n - 1))) * spread / math.sqrt(n))

    def percent(self) -> str:
        """Write as per cent."""
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.half) else f" ± {100 * self.half:.1f}")


@dataclass(frozen=True)
class Row:
    """One row of a table: runs that differ in their seed alone, at the learning rate that validated best."""

    name: str
    partition: str
    lr: float
    runs: int
    test: Interval
    worst: Interval
    trained: float
    sent: float
    lr_at_edge: bool


def read_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read every finished run below some folders: its summary, its learning rate and what is trainable.

    Raises:
        ValueError: no finished run is there.

    """
    listed = list(folders)
    paths = sorted(path for folder in listed for path in Path(folder).rglob("summary.json"))
    if not paths:
        raise ValueError(f"no finished run (summary.json) below {', '.join(map(str, listed))}")
    return [_read(path.parent) for path in paths]


def _read(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    trainable = config["model"]["trainable"]
    name = summary["mask_rule"] if trainable == "all" else f"{summary['mask_rule']}, trainable={trainable}"
    return summary | {"lr": config["optimizer"]["lr"], "name": name}


def rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs by name and partition, and keep the learning rate with the best mean validation accuracy."""
    keys = dict.fromkeys((run["partition"], run["name"]) for run in runs)
    return [_row(name, part, [r for r in runs if (r["partition"], r["name"]) == (part, name)]) for part, name in keys]


def _row(name: str, partition: str, runs: Sequence[Run]) -> Row:
    lrs = sorted({run["lr"] for run in runs})
    best = max(lrs, key=lambda lr: float(np.mean([run["val/acc"] for run in runs if run["lr"] == lr])))
    chosen = [run for run in runs if run["lr"] == best]
    return Row(
        name=name,
        partition=partition,
        lr=best,
        runs=len(chosen),
        test=Interval.of([run["test/acc"] for run in chosen]),
        worst=Interval.of([run["client/acc_worst10"] for run in chosen]),
        trained=float(np.mean([run["trainable_fraction"] for run in chosen])),
        sent=float(np.mean([run["bytes_up"] for run in chosen])),
        lr_at_edge=len(lrs) > 1 and best in (lrs[0], lrs[-1]),
    )


def markdown(table: Sequence[Row]) -> str:
    """Write rows as a Markdown table, best test accuracy first within each partition."""
    head = [
        "mask rule",
        "partition",
        "lr",
        "trained",
        "sent up, MB",
        "test accuracy, %",
        "worst tenth of clients, %",
        "seeds",
    ]
    order = sorted(table, key=lambda row: (row.partition, -row.test.mean))
    lines = [head, ["---"] * len(head)] + [_cells(row) for row in order]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row) -> list[str]:
    lr = f"{row.lr:g}" + ("*" if row.lr_at_edge else "")
    sent = f"{row.sent / 1e6:.1f}"
    figures = [row.test.percent(), row.worst.percent(), str(row.runs)]
    return [row.name, row.partition, lr, f"{row.trained:.1%}", sent, *figures]
