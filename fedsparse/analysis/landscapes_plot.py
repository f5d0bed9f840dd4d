"""Pictures of landscapes over rounds: a panel for each figure, a line for each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedsparse.analysis.landscapes import ACCURACY, BARRIER, DISTANCE, LINES, LOSS, REST, RISE, Setting, barrier_name
from fedsparse.analysis.style import Style, legend, panels, plain, styles
from fedsparse.analysis.tables import share

# figures of barriers: a loss that rises all the way from the global model to a client does not rise above the chord
_BARRIERS = {
    barrier_name(line, "test", BARRIER[place]): f"{line}, test:\n{BARRIER[place]}{', %' * percent}"
    for line, place, percent in ((LINES[1], 0, False), (LINES[1], 5, True), (LINES[0], 2, False), (LINES[0], 5, True))
}
# figure -> title of its panel
_PANELS = {name: name for name in (LOSS, ACCURACY, "lambda_1", "trace", RISE, REST, "mean rise", DISTANCE)} | _BARRIERS
_WIDE = 20.0  # highest over lowest mean from which an axis is logarithmic
_COLUMNS = 4


def several_rounds(shown: Sequence[Setting]) -> bool:
    """Whether there is a line to draw: any setting with landscapes of two rounds."""
    return any(len({found.round for found in one.found}) > 1 for one in shown)


def rounds_figure(shown: Sequence[Setting]) -> Figure:
    """Draw every figure that is there over the rounds: the mean over seeds, in a band from the lowest to the highest.

    Args:
        shown: settings of one data set and model.

    """
    there = [name for name in _PANELS if any(one.over_rounds(name) for one in shown)]
    columns = min(_COLUMNS, len(there))
    figure, axes = panels(-(-len(there) // columns), columns, size=(3.2, 2.6))
    flat = [panel for line in axes for panel in line]
    looks = styles([_label(one, shown) for one in shown])
    for panel, name in zip(flat, there, strict=False):
        _draw(panel, shown, name, looks)
        panel.set_title(_PANELS[name], fontsize="small")
    for panel in flat[len(there) :]:
        panel.set_visible(False)
    for panel in flat[max(0, len(there) - columns) : len(there)]:
        panel.set_xlabel("round")
    handles = [Line2D([], [], color=looks[n].colour, ls=looks[n].line, label=plain(n)) for n in sorted(looks)]
    legend(figure, handles)
    return figure


def _label(one: Setting, shown: Sequence[Setting]) -> str:
    """Name a line by its partition, which gives the colour, and by what else differs among those of its kind."""
    alike = [other for other in shown if other.partition == one.partition]
    rest = [one.name] * (len({other.name for other in alike}) > 1)
    rest += [share(one.row.sparsity)] * (len({other.row.sparsity for other in alike}) > 1)
    return ", ".join([one.partition, *rest])


def _draw(axes: Axes, shown: Sequence[Setting], name: str, looks: Mapping[str, Style]) -> None:
    """Draw one figure; its axis is logarithmic where all values are positive and lie far apart."""
    ends: list[float] = []
    for one in shown:
        if values := one.over_rounds(name):
            rounds, means = list(values), [float(np.mean(found)) for found in values.values()]
            low, high = [min(found) for found in values.values()], [max(found) for found in values.values()]
            look = looks[_label(one, shown)]
            axes.plot(rounds, means, ls=look.line, color=look.colour, linewidth=1.4, marker="o", markersize=3)
            axes.fill_between(rounds, low, high, color=look.colour, alpha=0.15, linewidth=0)
            ends += [*low, *high]
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if min(ends) > 0 and max(ends) > _WIDE * min(ends):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
