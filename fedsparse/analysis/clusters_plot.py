"""A picture of departments' clusters: who was with whom in each round, and how alike they are in the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsparse.analysis.style import CATEGORIES

Line = Mapping[str, Any]  # of clusters.jsonl
INDICES = (("ari_truth", "true clusters", "#000000", "-"), ("ari_before", "round before", "#0072B2", "--"))
_COSINES = "RdBu_r"
_NUMBERED = 8  # up to so many departments, each pair shows its cosine, and up to so many rounds each cell its cluster
_TICKS = 20


def read_clusters(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's ``clusters.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clusters_figure(lines: Sequence[Line], title: str = "") -> Figure:
    """Draw departments x rounds in the colours of their clusters, the adjusted Rand index, and the last cosines.

    Args:
        lines: of ``clusters.jsonl``, at least one: round, labels, k, ari_before, ari_truth and cosines (D, D) by what
            is compared.
        title: a line above the picture.

    Returns:
        The figure.

    """
    cosines = lines[-1]["cosines"]
    members, compared = len(lines[0]["labels"]), len(cosines)
    side = float(np.clip(0.34 * members, 1.7, 2.8))
    width, top = max(7.0, (side + 0.45) * compared + 1.0), float(np.clip(0.24 * members, 1.2, 4.0)) + 0.9
    figure = Figure(figsize=(width, top + side + 1.0), dpi=150, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[top, side + 0.6], squeeze=False)[:, 0]
    left, right = above.subplots(1, 2, width_ratios=[3, 2])
    _draw_assignment(left, lines)
    _draw_indices(right, lines)
    axes = below.subplots(1, max(compared, 3), squeeze=False)[0]  # one alone would be as wide as the figure
    for panel, (of, matrix) in zip(axes, cosines.items(), strict=False):
        _draw_cosines(panel, np.array(matrix, dtype=np.float64), of)
    for panel in axes[compared:]:
        panel.set_axis_off()
    axes[0].set_ylabel("department", fontsize=8)
    scale = below.colorbar(
        ScalarMappable(Normalize(-1, 1), _COSINES), ax=list(axes[:compared]), pad=0.01, aspect=14, shrink=0.9
    )
    scale.set_label(f"cosine, round {lines[-1]['round']}", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_assignment(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw a cell for each department and round, in the colour of its cluster."""
    labels = np.array([line["labels"] for line in lines]).T
    colours = ListedColormap([CATEGORIES[label % len(CATEGORIES)] for label in range(int(labels.max()) + 1)])
    edges = np.arange(labels.shape[1] + 1) - 0.5, np.arange(len(labels) + 1) - 0.5
    few = labels.shape[1] <= 30
    axes.pcolormesh(*edges, labels, cmap=colours, edgecolors="white" if few else "none", linewidth=0.8 if few else 0)
    if few:
        for (row, column), label in np.ndenumerate(labels):
            axes.text(column, row, str(label), ha="center", va="center", fontsize=7, color="white")
    axes.invert_yaxis()
    axes.set_title("cluster of each department", fontsize=9)
    axes.set_ylabel("department", fontsize=8)
    _number(axes.yaxis, len(labels))
    _rounds(axes, lines)


def _draw_indices(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw the adjusted Rand indices over the rounds: 1 is the same clusters, 0 is chance."""
    for key, name, colour, style in INDICES:
        points = [(place, line[key]) for place, line in enumerate(lines) if line.get(key) is not None]
        if points:
            marker = "o" if len(points) <= 30 else None
            axes.plot(
                *zip(*points, strict=True), style, color=colour, marker=marker, markersize=3, label=f"to the {name}"
            )
    axes.set_title("adjusted Rand index", fontsize=9)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]) - 0.05, 1.05)
    axes.set_xlim(-0.5, len(lines) - 0.5)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=7, loc="best")
    else:
        axes.text(0.5, 0.5, "nothing to compare with yet", ha="center", fontsize=8, transform=axes.transAxes)
    _rounds(axes, lines)


def _draw_cosines(axes: Axes, matrix: np.ndarray, of: str) -> None:
    """Draw a matrix of cosines, with numbers where there are few."""
    axes.imshow(matrix, cmap=_COSINES, vmin=-1, vmax=1, interpolation="nearest")
    if len(matrix) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, _two_digits(value), ha="center", va="center", fontsize=6, color=colour)
    axes.set_title(of if of != "row" else "all that trains", fontsize=9)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        _number(axis, len(matrix))
    axes.tick_params(length=0, labelsize=7)


def _two_digits(value: float) -> str:
    """Write a cosine without its 0.

    >>> [_two_digits(value) for value in (1.0, 0.947, -0.3, -0.001)]
    ['1', '.95', '-.30', '0']
    """
    if abs(value) < 0.005 or abs(value) >= 0.995:
        return f"{value + 0.0:.0f}".replace("-0", "0")
    return f"{value:.2f}".replace("0.", ".", 1)


def _rounds(axes: Axes, lines: Sequence[Line]) -> None:
    """Label places with the rounds of the lines."""
    step = -(-len(lines) // 10)
    places = range(0, len(lines), step)
    axes.set_xticks(list(places), [str(lines[place]["round"]) for place in places])
    axes.set_xlabel("round", fontsize=8)
    axes.tick_params(length=2, labelsize=7)


def _number(axis: Any, count: int) -> None:
    """Give an axis whole numbers as ticks."""
    if count <= _TICKS:
        axis.set_ticks(range(count))
    else:
        axis.set_major_locator(MaxNLocator(8, integer=True))
