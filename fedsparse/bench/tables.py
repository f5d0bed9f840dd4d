"""Rows as tables: in Markdown for a page, or on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from fedsparse.bench.problems import BARE
from fedsparse.bench.rows import Row

OWN = (
    "model",
    "with",
    "K",
    "hand-written loop, ms a round",
    "fedsparse, ms a round",
    "ratio (least to greatest)",
    "more, ms a cohort",
    "peak memory / the loop's, MB",
    "bytes up a round",
)
SPENT = (
    "model",
    "with",
    "K",
    "SGD of the loop",
    "processor, the loop's and fedsparse's, ms a round",
    "pages mapped, by the loop and by fedsparse, a round",
)
BESIDE = (
    "model",
    "runner",
    "version",
    "ratio (least to greatest)",
    "peak memory / the loop's, MB",
    "bytes up a round",
    "weights differ",
)


@dataclass(frozen=True)
class Table:
    """Heads and lines of equal length."""

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Write it as Markdown."""
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.heads, ["---"] * len(self.heads), *self.lines))

    def show(self) -> None:
        """Print it on the terminal."""
        table = RichTable(*self.heads)
        for line in self.lines:
            table.add_row(*line)
        Console(width=max(150, Console().width)).print(table)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Make two tables of fedsparse's rows, and one of the peers' with fedsparse among them, where there are any."""
    own = Table(OWN, [_own(row) for row in rows if row.runner == "fedsparse"])
    spent = Table(SPENT, [_spent(row) for row in rows if row.runner == "fedsparse" and row.sgd])
    models = {row.model for row in rows if row.runner != "fedsparse"}
    beside = Table(BESIDE, [_beside(row) for row in rows if row.model in models and row.setting in ("", BARE)])
    return [table for table in (own, spent, beside) if table.lines]


def read(path: Path) -> list[Row]:
    """Read the rows of a file that ``--json`` wrote.

    Raises:
        ValueError: it is not such a file.

    """
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no figures of fedsparse.bench: {error}") from error


def _own(row: Row) -> list[str]:
    times = [milliseconds(row.hand_ms), milliseconds(row.runner_ms), _ratio(row)]
    more = "" if row.extra_ms_per_cohort is None else f"{row.extra_ms_per_cohort:.2f}"
    return [row.model, row.setting, str(row.cohort), *times, more, _memory(row), _bytes(row)]


def _spent(row: Row) -> list[str]:
    cpu = f"{milliseconds(row.hand_cpu_ms)} / {milliseconds(row.runner_cpu_ms)}"
    pages = "" if row.hand_faults is None else f"{row.hand_faults:,.0f} / {row.runner_faults:,.0f}"
    return [row.model, row.setting, str(row.cohort), row.sgd, cpu, pages]


def _beside(row: Row) -> list[str]:
    name = f"{row.runner}, K = {row.cohort}" if row.runner == "fedsparse" else row.runner
    differ = row.note if row.weights_differ is None else f"{row.weights_differ:.0e}"
    return [row.model, name, row.version, _ratio(row), _memory(row), _bytes(row), "" if row.failed else differ]


def milliseconds(value: float | None) -> str:
    """Show a time.

    >>> milliseconds(7281.4), milliseconds(22.04), milliseconds(None)
    ('7,281', '22.0', '')
    """
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _ratio(row: Row) -> str:
    if row.failed or row.ratio is None:
        return f"failed: {row.note}"
    return f"{row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})"


def _memory(row: Row) -> str:
    if row.memory is None or row.hand_memory is None:
        return ""
    return f"{row.memory / 1e6:.1f} / {row.hand_memory / 1e6:.1f}"


def _bytes(row: Row) -> str:
    return "" if row.failed else "nothing serialised" if row.bytes_up is None else f"{row.bytes_up:,}"
