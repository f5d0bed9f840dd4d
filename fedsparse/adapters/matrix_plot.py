"""The heat map of models on test parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

WRITTEN = 14  # models and parts up to which each cell has its number
NAMED = 70  # models or parts up to which each has its name; of more every second one or fewer


def matrix_figure(figures: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of M models (rows) on D parts (columns).

    Args:
        figures: of ``measure.matrix``.

    """
    values = 100 * np.asarray(figures["accuracy"], dtype=np.float64)
    rows, columns = values.shape
    small = max(rows, columns) > WRITTEN
    side = min(0.28, 20 / max(rows, columns)) if small else 0.62
    words = 0.075 * max(map(len, [*figures["models"], *figures["parts"]]))
    size = (max(4.6, side * columns + words + 1.8), max(2.6, side * rows + words + 1.2))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    for (row, column), value in np.ndenumerate(values) if not small else ():
        colour = "black" if value > 60 else "white"  # viridis is light above
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    every = [max(1, -(-count // NAMED)) for count in (rows, columns)]
    names = figures["parts"][:: every[1]]
    axes.set_xticks(range(0, columns, every[1]), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, rows, every[0]), figures["models"][:: every[0]])
    axes.tick_params(length=0, labelsize=5 if small else 8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("test part of", fontsize=8)
    axes.set_ylabel("adapter of", fontsize=8)
    scale = figure.colorbar(image, shrink=0.9)
    scale.set_label("accuracy, %", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    axes.set_title(f"after round {figures['round']}", fontsize=9)
    return figure
