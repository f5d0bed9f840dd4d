"""The figures of a landscape, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_landscape(figures: Mapping[str, Any], written: Sequence[Path], console: Console | None = None) -> None:
    """Print models, barriers, curvature and sharpness, and the files that show them.

    Args:
        figures: what landscape.json holds.
        written: pictures, and the folder's other files.
        console: where to print; the terminal by default.

    """
    console = console or Console()
    if not console.is_terminal:
        console.width = 140  # a pipe has no width: rich would fold names at 80
    table = Table(title=f"landscape after round {figures['round']}", title_justify="left")
    table.add_column("figure")
    for name in ("loss", "accuracy"):
        table.add_column(name, justify="right")
    for row in [*_surfaces(figures), *_lines(figures)]:
        table.add_row(*row)
    console.print(table)
    if rows := [*_curvature(figures), *_sharpness(figures)]:
        table = Table("at the global model, training loss", "value")
        for pair in rows:
            table.add_row(*pair)
        console.print(table)
    for path in written:
        console.print(str(path), soft_wrap=True)


def number(value: float | None) -> str:
    """Write a figure; a gap is a dash.

    >>> number(0.123456), number(None)
    ('0.1235', '-')
    """
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _surfaces(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of the surfaces and of the models that are marked in them."""
    for data, found in _of("surface", figures):
        gaps = f", {found['gaps']} not finite" if found["gaps"] else ""
        ends = f"{number(found['lowest_loss'])} to {number(found['highest_loss'])}"
        yield f"{data}, {found['points']} points{gaps}", ends, ""
        for name, model in found["models"].items():
            yield f"{data}, {name}", number(model["loss"]), _percent(model["accuracy"])


def _lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of the barriers, three figures for a line."""
    words = {"above_chord": "above the chord", "above_worse_end": "above the worse end", "worst": "worst point"}
    for data, found in _of("lines", figures):
        for name, line in found["lines"].items():
            gaps = f", {line['gaps']} not finite" if line["gaps"] else ""
            loss, accuracy = line["loss_barrier"], line["accuracy_barrier"]
            for key, word in words.items():
                yield f"{data}, {name}{gaps}: {word}", number(loss[key]), _percent(accuracy[key])


def _curvature(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if found := figures.get("curvature"):
        pairs = zip(found["eigenvalues"], found["bounds"], strict=True)
        for place, (value, bound) in enumerate(pairs, start=1):
            yield f"eigenvalue {place} of the Hessian", f"{number(value)} ± {bound:.1e}"
        yield "trace", f"{number(found['trace'])} ± {number(found['trace_error'])}"
        yield "Frobenius norm", f"{number(found['frobenius'])} ± {number(found['frobenius_error'])}"


def _sharpness(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if found := figures.get("sharpness"):
        for key, word in {"sam": "SAM", "adaptive_sam": "adaptive SAM"}.items():
            step = found[key]
            first = number(step["first_order"])
            yield f"rise at {word}'s step, rho {found['rho']}", f"{number(step['rise'])}, of it first order {first}"
        rise = found["mean_rise"]
        text = f"{number(rise['rise'])} ± {number(rise['standard_error'])}"
        yield f"mean rise along random directions, radius {rise['radius']}", text


def _of(kind: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Parts of a kind, by data."""
    for name, found in figures.items():
        word, _, data = name.partition(" ")
        if word == kind and data:
            yield data, found
