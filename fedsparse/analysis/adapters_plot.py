"""A picture of low-rank adapters: what averaging does to them, and how far they move the model, over the rounds."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedsparse.analysis.style import CATEGORIES, legend, panels, percent

Row = Mapping[str, str]
Line = Mapping[int, float]  # by round
ERROR, RELATIVE, NORM = "error", "relative_error", "norm"
PANELS = (
    (ERROR, "error of averaging"),
    (RELATIVE, "its part of the update"),
    (NORM, "norm of the update"),
)


def read_adapters(path: Path) -> list[dict[str, str]]:
    """Read the rows of a run's ``lora.csv``."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def adapters_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw error and norm over the rounds: a line a department over all layers, or of one model its layers too.

    Over all layers a norm is the root of their summed squares, and the relative error that of the errors over that of
    the norms.

    Args:
        rows: of ``lora.csv``: round, group, layer, error, relative_error, norm.
        title: a line above the picture.

    Returns:
        The figure.

    """
    groups = sorted({int(row["group"]) for row in rows})
    figure, (axes,) = panels(1, len(PANELS), size=(3.6, 3.0))
    handles = []
    for place, group in enumerate(groups):
        own, colour = [row for row in rows if int(row["group"]) == group], CATEGORIES[place % len(CATEGORIES)]
        lines = over_layers(own)
        for panel, (column, _) in zip(axes, PANELS, strict=True):
            if len(groups) == 1:
                _draw_layers(panel, own, column)
            _draw(panel, lines[column], colour, 1.8)
        name = "all layers" if len(groups) == 1 else f"department {group}"
        handles.append(Line2D([], [], color=colour, lw=1.8, label=name))
    for panel, (_, label) in zip(axes, PANELS, strict=True):
        panel.set(xlabel="round", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    percent(axes[1])
    legend(figure, [*handles, *[Line2D([], [], color="0.7", lw=0.8, label="each layer")] * (len(groups) == 1)])
    figure.suptitle(title, fontsize=10)
    return figure


def over_layers(rows: Sequence[Row]) -> dict[str, Line]:
    """Sum squares over the layers of one group, by column and round.

    >>> both = [dict(round="1", error=e, norm=n) for e, n in (("3", "0"), ("4", "10"))]
    >>> over_layers(both)
    {'error': {1: 5.0}, 'relative_error': {1: 0.5}, 'norm': {1: 10.0}}
    """
    rounds = sorted({int(row["round"]) for row in rows})
    error, norm = (
        {number: math.hypot(*(float(row[column]) for row in rows if int(row["round"]) == number)) for number in rounds}
        for column in (ERROR, NORM)
    )
    relative = {number: error[number] / norm[number] if norm[number] else 0.0 for number in rounds}
    return {ERROR: error, RELATIVE: relative, NORM: norm}


def _draw_layers(axes: Axes, rows: Sequence[Row], column: str) -> None:
    """Draw a thin line for each layer."""
    for layer in dict.fromkeys(row["layer"] for row in rows):
        _draw(axes, {int(row["round"]): float(row[column]) for row in rows if row["layer"] == layer}, "0.7", 0.8)


def _draw(axes: Axes, line: Line, colour: str, width: float) -> None:
    """Draw one line, with marks where there are few rounds."""
    marker = "o" if len(line) <= 30 else None
    axes.plot(list(line), list(line.values()), color=colour, lw=width, marker=marker, markersize=1.8 * width)
