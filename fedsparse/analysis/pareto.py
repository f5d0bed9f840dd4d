"""Accuracy against bytes: who is beaten by nobody, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedsparse.analysis.page import Picture, Section, Table, slug
from fedsparse.analysis.style import Style, legend, markers, panels, percent, plain, styles, title
from fedsparse.analysis.table import Row, lengths, partitions, seeds
from fedsparse.analysis.tables import accuracy, megabytes, own_note, rule_head, said, share

AXES = {"bytes_up": "sent up by all clients", "bytes_total": "of all traffic, setup included"}
_TEXT = (
    "A point is a row: mean test accuracy over seeds, with its 95 % interval, against the mean bytes of the whole run "
    "(1 MB = 10^6 bytes). A picture is of one data set, one model and one length of training, which its title says. "
    "The step line is the Pareto front over all rows of its panel, masks, sparse exchanges and dense training alike: "
    "points that no other beats in one of the two without losing in the other. It goes by means: neighbours whose "
    "intervals overlap may change places with other seeds. Points lie where their bytes are. Rows that send nothing "
    "are in the table alone: a logarithmic axis has no place for them."
)
_EXCHANGE = "chosen each round"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other dominates.

    Args:
        points: (cost, value) pairs; a point dominates another with at most its cost, at least its value, and not both
            equal.

    Returns:
        Indices by ascending cost; equal points all stay.

    >>> front([(10, 0.9), (20, 0.8), (5, 0.5), (10, 0.7)])
    [2, 0]

    """
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not kept or points[index][1] > points[kept[-1]][1] or points[index] == points[kept[-1]]:
            kept.append(index)
    return kept


def section(table: Sequence[Row]) -> Section:
    """Show both costs of each data set, model and length with several rows: a picture each, and a table of fronts."""
    groups = {place: rows for place, rows in lengths(table).items() if len(rows) > 1}
    blocks: list[Table | Picture] = []
    for place, rows in groups.items():
        name = ", ".join(filter(None, place))
        suffix = f"-{slug(name)}" if len(groups) > 1 else ""
        drawn = [key for key in AXES if any(point(row, key)[0] > 0 for row in rows)]
        blocks += [Picture(f"pareto-{k}{suffix}", f"{name}: MB {AXES[k]}", _drawer(rows, k)) for k in drawn]
        head = ["partition", "bytes", rule_head(rows), "sparsity", "MB", "test accuracy, %"]
        body = [line for part in partitions(rows) for key in AXES for line in _lines(rows, part, key)]
        blocks.append(Table(head, body, f"Pareto fronts: {name}"))
    return Section("Accuracy against bytes", _TEXT + own_note(table), blocks)


def pareto_figure(table: Sequence[Row], key: str) -> Figure:
    """Draw one panel for each partition.

    Args:
        table: rows of all partitions, of one data set, model and length.
        key: ``bytes_up`` or ``bytes_total``.

    """
    table = [row for row in table if point(row, key)[0] > 0]  # a log axis has no place for 0
    names, marks = styles([row.name for row in table]), markers([_mark(row) for row in table])
    parts = partitions(table)
    columns = 2 if len(parts) in (2, 4) else min(len(parts), 3)
    figure, axes = panels(-(-len(parts) // columns), columns)
    flat = [panel for line in axes for panel in line]
    for panel, part in zip(flat, parts, strict=False):
        _draw(panel, [row for row in table if row.partition == part], key, names, marks)
        panel.set_title(plain(part), fontsize="medium")
        panel.set(xlabel=f"MB {AXES[key]}", ylabel="test accuracy" if panel in [line[0] for line in axes] else "")
    for panel in flat[len(parts) :]:
        panel.set_visible(False)
    legend(figure, _handles(names, marks))
    title(figure, said(table[0].task, table[0].length, seeds(table)))
    return figure


def point(row: Row, key: str) -> tuple[float, float]:
    """Give a row's mean cost in megabytes, and its mean test accuracy."""
    return row.over_seeds(key).mean / 1e6, row.over_seeds(row.headline).mean


def interval(row: Row) -> Any:
    """Give the 95 % interval of a row's accuracy as (2, 1) lengths below and above, cut at 0 and 100 %."""
    found = row.over_seeds(row.headline)
    half = np.nan_to_num(found.half)
    return np.array([[min(half, found.mean)], [min(half, 1 - found.mean)]])


def ticks(axes: Axes) -> None:
    """Label megabytes in full, and per cent."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    percent(axes)
    axes.margins(x=0.12)


def _drawer(table: Sequence[Row], key: str) -> Callable[[], Figure]:
    return lambda: pareto_figure(table, key)


def _lines(table: Sequence[Row], partition: str, key: str) -> list[list[str]]:
    shown = [row for row in table if row.partition == partition]
    best = [shown[i] for i in front([point(row, key) for row in shown])]
    figures = [(megabytes(row.over_seeds(key).mean, 2), accuracy(row)) for row in best]
    return [[partition, key, row.name, share(row.sparsity), *f] for row, f in zip(best, figures, strict=True)]


def _draw(axes: Axes, shown: Sequence[Row], key: str, names: Mapping[str, Style], marks: Mapping[str, str]) -> None:
    """Draw points with their intervals, and the front as a step line behind them."""
    points = [point(row, key) for row in shown]
    axes.set_xscale("log")
    best = [points[i] for i in front(points)]
    axes.step(*zip(*best, strict=True), where="post", color="#999999", linewidth=1.2, zorder=1)
    for row, (x, y) in zip(shown, points, strict=True):
        style, mark = names[row.name], marks[_mark(row)]
        axes.errorbar(x, y, interval(row), color=style.colour, linewidth=0.8, alpha=0.6, zorder=2)
        axes.plot(x, y, mark, ls="", ms=10 if mark == "*" else 6, alpha=0.85, zorder=3, **style.marker)
    ticks(axes)


def _mark(row: Row) -> str:
    """Say what a marker stands for: no mask, a fraction, or what is chosen each round."""
    return _EXCHANGE if row.exchange else f"{share(row.sparsity)} frozen" if row.sparsity else share(row.sparsity)


def _handles(names: Mapping[str, Style], marks: Mapping[str, str]) -> list[Line2D]:
    """Explain colours, markers and the line."""
    colours = [Line2D([], [], ls="", marker="o", label=plain(n), **style.marker) for n, style in names.items()]
    shapes = [Line2D([], [], linestyle="", marker=m, color="#444444", label=s) for s, m in marks.items()]
    return [*colours, *shapes, Line2D([], [], color="#999999", label="Pareto front")]
