"""The figures of a landscape, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_landscape(figures: Mapping[str, Any], written: Sequence[Path], console: Console | None = None) -> None:
    """Print models, surfaces, barriers, curvature and sharpness, and the files that show them.

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
    for row in [*_models(figures), *_surfaces(figures), *_lines(figures)]:
        table.add_row(*row)
    console.print(table)
    if rows := [*_distances(figures), *_curvature(figures), *_sharpness(figures)]:
        table = Table("training loss at the global model, and distances", "value")
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


def _models(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of the models on training and test data."""
    for name, model in figures["models"]["models"].items():
        for data in ("train", "test"):
            yield f"{data}, {name}", number(model[data]["loss"]), _percent(model[data]["accuracy"])


def _surfaces(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of the surfaces."""
    for data, found in _of("surface", figures):
        gaps = f", {found['gaps']} not finite" if found["gaps"] else ""
        ends = f"{number(found['lowest_loss'])} to {number(found['highest_loss'])}"
        yield f"{data}, surface of {found['points']} points{gaps}", ends, ""
        if found["evaluated"] != found["points"]:
            loss, accuracy = found["errors"]
            text = f"{data}, a spline through {found['evaluated']} points errs by at most, of the range"
            yield text, _percent(loss), _percent(accuracy)


def _lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of the barriers, three figures for a line."""
    words = {"above_chord": "above the chord", "above_worse_end": "above the worse end", "worst": "worst point"}
    for data, found in _of("lines", figures):
        for name, line in found["lines"].items():
            gaps = f", {line['gaps']} not finite" if line["gaps"] else ""
            loss, accuracy = line["loss_barrier"], line["accuracy_barrier"]
            for key, word in words.items():
                yield f"{data}, {name}{gaps}: {word}", number(loss[key]), _percent(accuracy[key])


def _distances(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, model in figures["models"]["models"].items():
        yield f"distance, {name} from the network as built", number(model["from_start"])
    for pair, apart in figures["models"]["distances"].items():
        yield f"distance, {pair}", number(apart)


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
        sigma, bound, paths = found["sigma"], found["pac_bayes"], found["path_norm"]
        word = {"accuracy": "accuracy falls", "loss": "loss rises"}[sigma["of"]]
        yield f"sigma, noise at which the {word} by {sigma['target']}", number(sigma["value"])
        error = f"the error is {_percent(bound['train_error'])} under this noise"
        yield f"PAC-Bayes bound of the error ({error})", _percent(bound["bound"])
        yield "path norm", paths["why"] or number(paths["value"])


def _of(kind: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Parts of a kind, by data."""
    for name, found in figures.items():
        word, _, data = name.partition(" ")
        if word == kind and data:
            yield data, found
