"""Curves of a run, from the rows of its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Rows = Sequence[Mapping[str, float]]
ACCURACY = {
    "val/acc": "validation",
    "test/acc": "test",
    "client/acc_mean": "clients, mean",
    "client/acc_worst10": "clients, worst tenth",
}
LOSS = {"train/loss": "training", "val/loss": "validation", "test/loss": "test"}
BYTES = {"bytes_up": "sent up", "bytes_dense": "the same, dense", "bytes_down": "sent down"}


def curves_figure(rows: Rows, title: str = "") -> Figure:
    """Draw accuracy, loss and bytes over the rounds.

    Args:
        rows: one mapping a round, with ``round`` and any of the columns of metrics.csv.
        title: above the figure.

    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw(left, rows, ACCURACY, "accuracy")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _draw(middle, rows, LOSS, "loss")
    _draw(right, rows, BYTES, "megabytes so far", scale=1e-6)
    right.set_ylim(bottom=0)
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, rows: Rows, columns: Mapping[str, str], label: str, scale: float = 1.0) -> None:
    """Draw one line for each column that has values, over the rounds that have them."""
    for column, name in columns.items():
        points = [(row["round"], row[column] * scale) for row in rows if column in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3, label=name)
    axes.set(xlabel="round", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
