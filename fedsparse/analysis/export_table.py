"""What an export changed, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsparse.simulation.progress import human_bytes

FEW = 12  # layers that the second table lists


def print_export(folder: Path, figures: Mapping[str, Any], console: Console | None = None) -> None:
    """Print both models side by side, what became of the layers, and where the files are.

    Args:
        folder: where they are.
        figures: what ``fedsparse.export.export`` returns.
        console: where to print; the terminal by default.

    """
    console = console or Console()
    if not console.is_terminal:
        console.width = 140  # a pipe has no width: rich would fold names at 80
    console.print(_models(figures))
    if figures["cuts"]:
        console.print(_layers(figures["cuts"]))
    if words := nothing_smaller(figures):
        console.print(words, soft_wrap=True)
    console.print(f"exported model: {folder}", soft_wrap=True)


def nothing_smaller(figures: Mapping[str, Any]) -> str:
    """Say in one line that zeros are scattered or could not be removed; empty if the model became smaller.

    >>> same = {"num_parameters": 9, "num_nonzero": 9}
    >>> nothing_smaller({"before": same, "after": same, "cuts": [], "unit": "output"})
    'nothing could be made smaller: no unit is zero'
    """
    before, after = figures["before"], figures["after"]
    if after["num_parameters"] < before["num_parameters"]:
        return ""
    why = "the units that are zero have to stay, see above" if figures["cuts"] else "no unit is zero"
    if figures["unit"] == "coordinate":
        why += "; sparsity.unit=coordinate scatters the zeros, sparsity.unit=output prunes whole units"
    return f"nothing could be made smaller: {why}"


def _models(figures: Mapping[str, Any]) -> Table:
    table = Table(title="pruned model and smaller model", title_justify="left")
    for name in ("figure", "pruned", "smaller", "ratio"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for row in _rows(figures):
        table.add_row(*row)
    return table


def _rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Figure, before, after, and after over before."""
    before, after = figures["before"], figures["after"]
    counts = {
        "parameters": "num_parameters",
        "parameters that are not zero": "num_nonzero",
        "FLOPs of a forward, a sample": "flops",
        "FLOPs if zeros cost nothing (theory)": "flops_sparse",
    }
    for label, key in counts.items():
        yield label, f"{before[key]:,.0f}", f"{after[key]:,.0f}", _quotient(after[key], before[key])
    yield "compression, all / not zero", f"{before['compression']:.2f}", f"{after['compression']:.2f}", ""
    for name, size in after["bytes"].items():
        old = before["bytes"][name]
        yield name, human_bytes(old), human_bytes(size), _quotient(size, old)
    for runner, ratio in figures["time"].items():
        label = {"torch": "forward, torch", "onnx": "forward, ONNX Runtime"}[runner]
        yield f"time of a {label}", "", "", f"{ratio:.2f}"


def _quotient(after: float, before: float) -> str:
    return f"{after / before:.2f}" if before else ""


def _layers(cuts: list[Mapping[str, Any]]) -> Table:
    """Layers that lost units first, then those that hold dead ones."""
    table = Table(title="layers with zero units", title_justify="left")
    for name in ("layer", "units", "before", "after", "zero, but stay", "because"):
        table.add_column(name, justify="right" if name in ("before", "after", "zero, but stay") else "left")
    ordered = sorted(cuts, key=lambda cut: cut["before"] == cut["after"])
    for cut in ordered[:FEW]:
        dead = str(cut["dead"] or "")
        table.add_row(cut["layer"], cut["units"], str(cut["before"]), str(cut["after"]), dead, cut["why"])
    if len(ordered) > FEW:
        table.add_row(f"and {len(ordered) - FEW} more, in figures.json")
    return table
