"""Accuracy against bytes: who is beaten by nobody, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedsparse.analysis.page import Picture, Section, Table
from fedsparse.analysis.style import Style, legend, markers, panels, percent, plain, styles
from fedsparse.analysis.table import Row, partitions
from fedsparse.analysis.tables import share

AXES = {"bytes_up": "sent up by all clients", "bytes_total": "of all traffic, setup included"}
_TEXT = (
    "A point is a rule at a sparsity: mean test accuracy over seeds, with its 95 % interval, against the mean bytes of "
    "the whole run (1 MB = 10^6 bytes). The step line is the Pareto front: points that no other beats in one of the "
    "two without losing in the other. It goes by means: neighbours whose intervals overlap may change places with "
    "other seeds. Rules that send the same are drawn beside each other; those on the front, and the table, are exact."
)


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
    """Show both costs: their fronts as one table, and a picture each."""
    pictures = [Picture(f"pareto-{key}", f"Test accuracy against MB {AXES[key]}", _drawer(table, key)) for key in AXES]
    head = ["partition", "bytes", "mask rule", "sparsity", "MB", "test accuracy, %"]
    body = [line for part in partitions(table) for key in AXES for line in _lines(table, part, key)]
    return Section("Accuracy against bytes", _TEXT, [*pictures, Table(head, body, "Pareto fronts")])


def pareto_figure(table: Sequence[Row], key: str) -> Figure:
    """Draw one panel for each partition.

    Args:
        table: rows of all partitions.
        key: ``bytes_up`` or ``bytes_total``.

    """
    names, marks = styles([row.name for row in table]), markers([row.sparsity for row in table])
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
    return figure


def point(row: Row, key: str) -> tuple[float, float]:
    """Give a row's mean cost in megabytes, and its mean test accuracy."""
    return row.over_seeds(key).mean / 1e6, row.over_seeds("test/acc").mean


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
    figures = [(f"{point(row, key)[0]:.2f}", row.over_seeds("test/acc").percent()) for row in best]
    return [[partition, key, row.name, share(row.sparsity), *f] for row, f in zip(best, figures, strict=True)]


def _draw(axes: Axes, shown: Sequence[Row], key: str, names: Mapping[str, Style], marks: Mapping[float, str]) -> None:
    """Draw points with their intervals, and the front as a step line behind them."""
    shown = [row for row in shown if row.over_seeds(key).mean > 0]  # a log axis has no place for 0
    points = [point(row, key) for row in shown]
    axes.set_xscale("log")
    if best := front(points):
        axes.step(*zip(*[points[i] for i in best], strict=True), where="post", color="#999999", linewidth=1.2, zorder=1)
    for row, (x, y), aside in zip(shown, points, _aside(points, best), strict=True):
        style, half = names[row.name], np.nan_to_num(row.over_seeds("test/acc").half)
        axes.errorbar(x * aside, y, half, color=style.colour, linewidth=0.8, alpha=0.6, zorder=2)
        fill = style.colour if style.filled else "white"
        axes.plot(x * aside, y, marks[row.sparsity], ms=_size(row), color=style.colour, mfc=fill, zorder=3)
    ticks(axes)


def _aside(points: Sequence[tuple[float, float]], best: Sequence[int]) -> list[float]:
    """Find factors that set points of the same bytes, to three digits, beside each other; the front stays in place."""
    costs = [f"{x:.3g}" for x, _ in points]
    step = 0.015 * max(0.5, np.ptp(np.log10([x for x, _ in points]))) if points else 0.0
    order = sorted(range(len(points)), key=lambda i: i not in best)
    groups = {cost: [i for i in order if costs[i] == cost] for cost in costs}
    ranks = [groups[cost].index(i) for i, cost in enumerate(costs)]  # in place, right, left, right, ...
    return [1.0 if i in best else 10 ** (step * ((rank + 1) // 2) * (-1) ** (rank + 1)) for i, rank in enumerate(ranks)]


def _size(row: Row) -> float:
    return 6 if row.sparsity else 10  # a star looks smaller than it is


def _handles(names: Mapping[str, Style], marks: Mapping[float, str]) -> list[Line2D]:
    """Explain colours, markers and the line."""
    colours = [
        Line2D([], [], linestyle="", marker="o", color=s.colour, mfc=s.colour if s.filled else "white", label=plain(n))
        for n, s in names.items()
    ]
    shapes = [
        Line2D([], [], linestyle="", marker=m, color="#444444", label=f"{share(s)} frozen" if s else share(s))
        for s, m in marks.items()
    ]
    return [*colours, *shapes, Line2D([], [], color="#999999", label="Pareto front")]
