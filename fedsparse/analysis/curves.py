"""Curves of a run, from the rows of its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Rows = Sequence[Mapping[str, float]]
# column -> (name, colour, line style); a split has one colour in all panels
ACCURACY = {
    "val/acc": ("validation", "C0", "-"),
    "test/acc": ("test", "C1", "-"),
    "client/acc_worst10": ("worst tenth of the clients, test", "C3", "--"),
    "val/personal_acc": ("clients' own models, validation", "C9", "-"),
    "personal/acc_mean": ("clients' own models, test", "C8", "-"),
}
LOSS = {
    "train/loss": ("training, clients of the round", "C7", "-"),
    "val/loss": ("validation", "C0", "-"),
    "test/loss": ("test", "C1", "-"),
    "val/personal_loss": ("clients' own models, validation", "C9", "-"),
    "personal/loss": ("clients' own models, test", "C8", "-"),
}
BYTES = {
    "bytes_dense": ("sent up, if it were dense", "C7", "--"),
    "bytes_up": ("sent up", "C2", "-"),
    "bytes_down": ("sent down", "C4", ":"),
}
Styles = Mapping[str, tuple[str, str, str]]


def curves_figure(rows: Rows, title: str = "") -> Figure:
    """Draw accuracy, loss and bytes over the rounds.

    Args:
        rows: one mapping a round, with ``round`` and any of the columns of metrics.csv; where ``phase`` changes, a
            dotted line stands.
        title: above the figure.

    """
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
    left, middle, right = figure.subplots(1, 3)
    _draw(left, rows, ACCURACY, "accuracy")
    left.set_ylim(bottom=max(0.0, left.get_ylim()[0]))  # where all are 0, the margin would be below
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    _draw(middle, rows, LOSS, "loss")
    _draw(right, rows, BYTES, "megabytes so far", scale=1e-6)
    right.set_ylim(bottom=0)
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, rows: Rows, columns: Styles, label: str, scale: float = 1.0) -> None:
    """Draw one line for each column that has values, over the rounds that have them."""
    for column, (name, colour, line) in columns.items():
        points = [(row["round"], row[column] * scale) for row in rows if column in row]
        if points:
            marker = "o" if len(points) <= 30 else None
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=3, label=name)
    edges = phase_edges(rows)
    for edge in edges:
        axes.axvline(edge, color="0.4", linestyle=":", linewidth=1.2)
    axes.set(xlabel="round (dotted: the next phase)" if edges else "round", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(rows) == 1:
        axes.set_xlim(rows[0]["round"] - 1, rows[0]["round"] + 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def phase_edges(rows: Rows) -> list[float]:
    """Find where a phase ends and the next begins, between two rounds.

    >>> phase_edges([{"round": 1, "phase": 0}, {"round": 2, "phase": 1}, {"round": 3, "phase": 1}])
    [1.5]
    """
    pairs = pairwise(rows)
    return [(a["round"] + b["round"]) / 2 for a, b in pairs if a.get("phase") != b.get("phase")]
