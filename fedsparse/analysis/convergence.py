"""Accuracy over rounds, and what it takes to reach a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedsparse.analysis.folders import Run
from fedsparse.analysis.page import Picture, Section, Table, slug
from fedsparse.analysis.statistics import Interval
from fedsparse.analysis.style import Style, legend, panels, percent, plain, styles
from fedsparse.analysis.table import Row, partitions, sparsities
from fedsparse.analysis.tables import rule_head, share

SPLITS = {"val/acc": "validation", "test/acc": "test"}
_TEXT = (
    "Mean over seeds of the global model's accuracy after each round, from metrics.csv; the band is the 95 % interval "
    "of the mean, cut at 0 and 100 %, and wide where seeds are few. Rows without a mask stand in every picture; the "
    "vertical axes of the partitions differ."
)
_TARGET_TEXT = (
    "The first round whose validation accuracy reaches the target, and the bytes up to its end: mean over the seeds "
    "that got there ± 95 % interval. Where some did not, the mean flatters the row: they would need more rounds than "
    "they had. The target of a partition is {fraction:.4g} times the best mean test accuracy of dense training."
)
Curve = list[tuple[int, Interval]]


def section(table: Sequence[Row]) -> Section:
    """Show one picture for each sparsity."""
    return Section("Convergence", _TEXT, [_picture(table, s) for s in sparsities(table) or [0.0]])


def target_section(table: Sequence[Row], fraction: float) -> Section:
    """Show rounds and bytes to the target of each partition that has a dense row."""
    head = [
        "partition",
        "target, %",
        rule_head(table),
        "sparsity",
        "rounds",
        "sent up, MB",
        "in all, MB",
        "not reached",
    ]
    body = [line for part in partitions(table) for line in _target_lines(table, part, fraction)]
    return Section("Rounds and bytes to a target", _TARGET_TEXT.format(fraction=fraction), [Table(head, body)])


def curve(runs: Sequence[Run], column: str) -> Curve:
    """Estimate a column of metrics.csv round by round, over the runs that have it."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if column in row:
                found.setdefault(int(row["round"]), []).append(row[column])
    return [(round_, Interval.of(found[round_])) for round_ in sorted(found)]


def reached(run: Run, target: float) -> Mapping[str, float] | None:
    """Find the first row of metrics.csv with at least this validation accuracy."""
    return next((row for row in run.rows if row.get("val/acc", -1.0) >= target), None)


def convergence_figure(table: Sequence[Row], sparsity: float) -> Figure:
    """Draw validation beside test, one row for each partition.

    Args:
        table: rows of all sparsities.
        sparsity: the one to draw, with the rows that have no mask.

    """
    shown = [row for row in table if row.sparsity in (0.0, sparsity)]
    looks, parts = styles([row.name for row in table]), partitions(table)
    figure, axes = panels(len(parts), len(SPLITS), shared=True)
    for line, part in zip(axes, parts, strict=True):
        line[0].set_ylabel(f"{plain(part)}\naccuracy")
        for panel, column in zip(line, SPLITS, strict=True):
            draw_curves(panel, [row for row in shown if row.partition == part], column, looks)
    for panel, split in zip(axes[0], SPLITS.values(), strict=True):
        panel.set_title(split, fontsize="medium")
    for panel in axes[-1]:
        panel.set_xlabel("round")
    names = sorted({row.name for row in shown})
    legend(figure, [Line2D([], [], color=looks[n].colour, ls=looks[n].line, label=plain(n)) for n in names])
    return figure


def draw_curves(axes: Axes, shown: Sequence[Row], column: str, looks: Mapping[str, Style]) -> None:
    """Draw a column of metrics.csv over rounds, a line with its band for each row, in the look of its name."""
    for row in shown:
        if points := curve(row.runs, column):
            rounds, means = [r for r, _ in points], np.array([i.mean for _, i in points])
            half = np.nan_to_num([i.half for _, i in points])
            look, marker = looks[row.name], "o" if len(points) == 1 else None
            axes.plot(rounds, means, look.line, color=look.colour, linewidth=1.4, marker=marker)
            low, high = np.clip(means - half, 0, 1), np.clip(means + half, 0, 1)
            axes.fill_between(rounds, low, high, color=look.colour, alpha=0.1, linewidth=0)
    percent(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _picture(table: Sequence[Row], sparsity: float) -> Picture:
    caption = f"Accuracy over rounds, {share(sparsity)} frozen" if sparsity else "Accuracy over rounds"
    return Picture(f"convergence-{slug(share(sparsity))}", caption, lambda: convergence_figure(table, sparsity))


def _target_lines(table: Sequence[Row], partition: str, fraction: float) -> list[list[str]]:
    shown = [row for row in table if row.partition == partition]
    dense = [row.over_seeds("test/acc").mean for row in shown if row.dense]
    target = fraction * max(dense, default=float("nan"))
    return [[partition, f"{100 * target:.1f}", *_target_cells(row, target)] for row in shown] if dense else []


def _target_cells(row: Row, target: float) -> list[str]:
    runs = [run for run in row.runs if run.rows]
    there = [found for run in runs if (found := reached(run, target)) is not None]
    rounds = Interval.of([found["round"] for found in there]).text()
    sent = [Interval.of([f[key] / 1e6 for f in there if key in f]).text() for key in ("bytes_up", "bytes_total")]
    return [row.name, share(row.sparsity), rounds, *sent, f"{len(runs) - len(there)} of {len(runs)}"]
