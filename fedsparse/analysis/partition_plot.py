"""A picture of a partition: how many samples of each class every client holds, and how large each client is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from fedsparse.data.checks import Floats, Ints
from fedsparse.data.dealing import class_counts

_ROWS = 1000  # more clients than this are drawn as means of neighbours: a screen has no more rows
_TICKS = 20  # up to so many classes or clients, each has a tick; and up to its square of cells, each shows its count
_COLORS = colormaps["Blues"](np.linspace(0.18, 1, 256))  # sequential; one sample is already darker than none
_NONE = "white"  # a class that a client does not hold at all
_BAR = "#6b7a8c"


def partition_figure(labels: npt.ArrayLike, parts: Sequence[Ints], num_classes: int, title: str = "") -> Figure:
    """Draw clients x classes as a heat map of counts, with a bar of each client's size beside it.

    Above 1,000 clients a row is the mean of neighbouring clients. Needs no display and changes no global state of
    matplotlib: write it with ``figure.savefig("partition.png")``.

    Args:
        labels: class of each sample (n,), below ``num_classes``.
        parts: sample indices of each client, K arrays, at least one.
        num_classes: number of classes C.
        title: a line above the picture.

    Returns:
        The figure.

    """
    edges, rows = _mean_counts(np.asarray(labels), parts, num_classes)
    width = 3.0 + float(np.clip(0.42 * num_classes, 2.4, 7.0))
    height = 1.4 + float(np.clip(0.26 * len(parts), 1.2, 6.6))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    heat, bars, scale = figure.subplots(1, 3, width_ratios=[width - 2.4, 0.9, 0.16])
    image = _draw_counts(heat, rows, edges)
    bars.sharey(heat)
    _draw_sizes(bars, rows.sum(axis=1), edges)
    figure.colorbar(image, cax=scale, label="samples", ticks=MaxNLocator("auto", integer=True, min_n_ticks=1))
    _label(heat, len(parts), num_classes, grouped=len(rows) < len(parts))
    figure.suptitle(title)
    return figure


def _mean_counts(labels: Ints, parts: Sequence[Ints], num_classes: int) -> tuple[Floats, Floats]:
    """Average the class counts of neighbouring clients down to at most 1,000 rows: edges (R + 1,), rows (R, C)."""
    group = -(-len(parts) // _ROWS)
    edges = np.append(np.arange(0, len(parts), group), len(parts)).astype(np.float64)
    return edges - 0.5, class_counts(parts, labels, num_classes, group) / np.diff(edges)[:, None]


def _draw_counts(axes: Axes, rows: Floats, edges: Floats) -> AxesImage:
    """Draw the heat map, with numbers in the cells while they are few."""
    colors = ListedColormap(_COLORS).with_extremes(bad=_NONE)
    classes = rows.shape[1]
    extent = (-0.5, classes - 0.5, edges[-1], edges[0])
    top = max(float(rows.max()), 1.0)
    image = axes.imshow(
        np.ma.masked_equal(rows, 0),
        cmap=colors,
        vmin=0,
        vmax=top,
        extent=extent,
        aspect="auto",
        interpolation="nearest",
    )
    if max(classes, rows.size // _TICKS) <= _TICKS:
        for row, column in np.argwhere(rows > 0):
            dark = rows[row, column] > 0.5 * top
            count, color = f"{rows[row, column]:.0f}", "white" if dark else "black"
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color=color)
    return image


def _draw_sizes(axes: Axes, sizes: Floats, edges: Floats) -> None:
    """Draw the client sizes as horizontal bars; many are one patch, as single ones are slow and leave seams."""
    largest = max(float(sizes.max()), 1.0)
    if len(sizes) <= 2 * _TICKS:
        axes.barh(range(len(sizes)), sizes, height=0.8, color=_BAR)
    else:
        axes.stairs(sizes, edges, orientation="horizontal", fill=True, color=_BAR, linewidth=0)
    axes.set(xlabel="samples\nper client", xlim=(0, 1.15 * largest), xticks=[0, round(largest)])
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, clients: int, num_classes: int, *, grouped: bool) -> None:
    """Name the axes, and give them whole numbers as ticks."""
    axes.set(xlabel="class", ylabel="client (rows are means of neighbours)" if grouped else "client")
    for axis, number in ((axes.xaxis, num_classes), (axes.yaxis, clients)):
        if number <= _TICKS:
            axis.set_ticks(range(number))
        else:
            axis.set_major_locator(MaxNLocator(10, integer=True))
    axes.tick_params(length=2)
