"""Accuracy over rounds, and what it takes to reach a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedsparse.analysis.curves import phase_edges
from fedsparse.analysis.folders import Run
from fedsparse.analysis.page import Picture, Section, Table, slug
from fedsparse.analysis.statistics import Interval
from fedsparse.analysis.style import Style, legend, panels, percent, plain, styles, title
from fedsparse.analysis.table import Row, Task, lengths, locally, partitions, seeds, sparsities, tasks
from fedsparse.analysis.tables import rule_head, said, share
from fedsparse.core.monitor import ACCURACY

SPLITS = ("validation", "test")
_TEXT = (
    "Mean over seeds of the accuracy after each round, from metrics.csv: of the global model, or of the clients' own "
    "models where something stays with them. The band is the 95 % interval of the mean, cut at 0 and 100 %, and wide "
    "where seeds are few. Rows without a mask stand in every picture of their data and model; the vertical axes of "
    "the partitions differ. A dotted line in a row's colour stands where its next phase begins."
)
_TARGET_TEXT = (
    "The first round whose validation accuracy reaches the target, and the bytes up to its end: mean over the seeds "
    "that got there ± 95 % interval. Where some did not, the mean flatters the row: they would need more rounds than "
    "they had. The target of a partition is {fraction:.4g} times the best mean test accuracy of dense training of the "
    "same data, model and length."
)
_REACH_TEXT = (
    "The first round whose validation accuracy is at least that high, and the bytes up to its end: mean over the seeds "
    "that got there ± 95 % interval. Where some did not, the mean flatters the row. A round of one row may hold more "
    "local work than one of another."
)
_TARGET_HEAD = ("rounds", "sent up, MB", "in all, MB", "not reached")
Curve = list[tuple[int, Interval]]


def section(table: Sequence[Row]) -> Section:
    """Show one picture for each data set, model and sparsity that has curves."""
    curved = [row for row in table if any(run.rows for run in row.runs)]
    groups = tasks(curved)
    pictures = [
        _picture(rows, sparsity, task if len(groups) > 1 else ("", ""))
        for task, rows in groups.items()
        for sparsity in sparsities(rows) or [0.0]
    ]
    return Section("Convergence", _TEXT, pictures)


def target_section(table: Sequence[Row], fraction: float) -> Section:
    """Show rounds and bytes to the target of each data set, model, length and partition that has a dense row."""
    head = ["partition", "target, %", rule_head(table), "sparsity", *_TARGET_HEAD]
    tables = [
        Table(
            head,
            [line for part in partitions(rows) for line in _target_lines(rows, part, fraction)],
            ", ".join(filter(None, place)),
        )
        for place, rows in lengths(table).items()
    ]
    return Section("Rounds and bytes to a target", _TARGET_TEXT.format(fraction=fraction), tables)


def reach_section(table: Sequence[Row], accuracy: float) -> Section:
    """Show rounds and bytes to one accuracy, for rows of any length: more local work in fewer rounds, say."""
    tables = []
    for task, rows in tasks(table).items():
        shown = [row for part in partitions(rows) for row in rows if row.partition == part]
        body = [[row.partition, *_target_cells(row, accuracy)] for row in shown]
        tables.append(Table(["partition", rule_head(table), "sparsity", *_TARGET_HEAD], body, said(task)))
    return Section(f"Rounds and bytes to {100 * accuracy:.4g} %", _REACH_TEXT, tables)


def curve(runs: Sequence[Run], column: str) -> Curve:
    """Estimate a column of metrics.csv round by round, over the runs that have it."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if column in row:
                found.setdefault(int(row["round"]), []).append(row[column])
    return [(round_, Interval.of(found[round_])) for round_ in sorted(found)]


def reached(run: Run, target: float, column: str = ACCURACY) -> Mapping[str, float] | None:
    """Find the first row of metrics.csv with at least this validation accuracy."""
    return next((row for row in run.rows if row.get(column, -1.0) >= target), None)


def convergence_figure(table: Sequence[Row], sparsity: float) -> Figure:
    """Draw validation beside test, one row for each partition.

    Args:
        table: rows of all sparsities, of one data set and model.
        sparsity: the one to draw, with the rows that have no mask.

    """
    shown = locally([row for row in table if row.sparsity in (0.0, sparsity)])
    looks, parts = styles([row.name for row in shown]), partitions(shown)
    figure, axes = panels(len(parts), len(SPLITS), shared=True)
    for line, part in zip(axes, parts, strict=True):
        line[0].set_ylabel(f"{plain(part)}\naccuracy")
        for panel, split in zip(line, SPLITS, strict=True):
            draw_curves(panel, [row for row in shown if row.partition == part], split, looks)
    for panel, split in zip(axes[0], SPLITS, strict=True):
        panel.set_title(split, fontsize="medium")
    for panel in axes[-1]:
        panel.set_xlabel("round")
    names = sorted({row.name for row in shown})
    phases = [Line2D([], [], color="0.4", ls=":", label="the next phase")] * any(map(edges, shown))
    legend(figure, [*[Line2D([], [], color=looks[n].colour, ls=looks[n].line, label=plain(n)) for n in names], *phases])
    title(figure, said(shown[0].task, _frozen(sparsity), seeds(shown)))
    return figure


def column_of(row: Row, split: str) -> str:
    """Name the column of metrics.csv that counts for a row."""
    return row.validated if split == SPLITS[0] else row.headline


def edges(row: Row) -> list[float]:
    """Find where phases of a row's first run begin, between two rounds."""
    return phase_edges(row.runs[0].rows)


def draw_curves(axes: Axes, shown: Sequence[Row], split: str, looks: Mapping[str, Style]) -> None:
    """Draw the accuracy of a split over rounds, a line with its band for each row, in the look of its name."""
    for row in shown:
        look = looks[row.name]
        if points := curve(row.runs, column_of(row, split)):
            rounds, means = [r for r, _ in points], np.array([i.mean for _, i in points])
            half = np.nan_to_num([i.half for _, i in points])
            marker = "o" if len(points) == 1 else None
            axes.plot(rounds, means, ls=look.line, color=look.colour, linewidth=1.4, marker=marker)
            low, high = np.clip(means - half, 0, 1), np.clip(means + half, 0, 1)
            axes.fill_between(rounds, low, high, color=look.colour, alpha=0.1, linewidth=0)
        for edge in edges(row):
            axes.axvline(edge, color=look.colour, linestyle=":", linewidth=1.0)
    percent(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _frozen(sparsity: float) -> str:
    return f"{share(sparsity)} frozen" if sparsity else ""


def _picture(rows: Sequence[Row], sparsity: float, task: Task) -> Picture:
    caption = said(rows[0].task, f"accuracy over rounds{', ' * bool(sparsity)}{_frozen(sparsity)}")
    name = slug(said(task, share(sparsity)))
    return Picture(f"convergence-{name}", caption, lambda: convergence_figure(rows, sparsity))


def _target_lines(table: Sequence[Row], partition: str, fraction: float) -> list[list[str]]:
    shown = [row for row in table if row.partition == partition]
    dense = [row.over_seeds(row.headline).mean for row in shown if row.dense]
    target = fraction * max(dense, default=float("nan"))
    return [[partition, f"{100 * target:.1f}", *_target_cells(row, target)] for row in shown] if dense else []


def _target_cells(row: Row, target: float) -> list[str]:
    runs = [run for run in row.runs if run.rows]
    there = [found for run in runs if (found := reached(run, target, row.validated)) is not None]
    rounds = Interval.of([found["round"] for found in there]).text()
    sent = [_megabytes(Interval.of([f[key] / 1e6 for f in there if key in f])) for key in ("bytes_up", "bytes_total")]
    return [row.name, share(row.sparsity), rounds, *sent, f"{len(runs) - len(there)} of {len(runs)}"]


def _megabytes(found: Interval) -> str:
    return found.text(digits=3 if found.mean < 1 else 1)
