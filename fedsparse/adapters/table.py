"""Adapters and their figures, for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

WIDEST = 10  # clients of which a table has a column each


def console_of(console: Console | None) -> Console:
    """Take a console; a pipe has no width, and rich would fold names at 80 columns."""
    found = console or Console()
    if not found.is_terminal:
        found.width = 140
    return found


def print_listing(listing: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a run keeps: adapters by layer, models, and sizes.

    Args:
        listing: of ``listing``.
        console: where to print; the terminal by default.

    """
    console = console_of(console)
    table = Table("layer", "in", "out", "rank", "alpha", "scale", "bytes", title="adapters", title_justify="left")
    for row in listing["layers"]:
        table.add_row(
            row["layer"], *(f"{row[key]:g}" for key in ("in", "out", "rank", "alpha", "scale")), f"{row['bytes']:,}"
        )
    console.print(table)
    table = Table("department", "clients", "keep a model of their own", title="models", title_justify="left")
    for name, row in listing["departments"].items():
        table.add_row(name, _numbers(row["clients"]), _numbers(row["own"]))
    console.print(table)
    table = Table("of the run", "")
    table.add_row("method", str(listing["method"]))
    table.add_row("targets", ", ".join(listing["targets"]))
    table.add_row("trains beside the adapters", ", ".join(listing["beside"]) or "nothing")
    table.add_row("stays with clients", ", ".join(listing["local"]) or "nothing")
    table.add_row("rounds that are kept", _numbers(listing["rounds"]))
    for name, size in listing["bytes"].items():
        table.add_row(f"bytes of {name}", f"{size:,}")
    console.print(table)


def print_matrix(figures: Mapping[str, Any], console: Console | None = None) -> None:
    """Print accuracy and, below it, loss of every model on every part, the best of a column bold; see ``condensed``.

    Args:
        figures: of ``measure.matrix``.
        console: where to print; the terminal by default.

    """
    figures, console = condensed(figures), console_of(console)
    title = f"accuracy, and loss, after round {figures['round']}"
    table = Table("adapter", title=title, title_justify="left")
    for name, count in zip(figures["parts"], figures["samples"], strict=True):
        table.add_column(f"{name}\n{count}", justify="right")
    best = [max(column) for column in zip(*figures["accuracy"], strict=True)]
    for name, accuracies, losses in zip(figures["models"], figures["accuracy"], figures["loss"], strict=True):
        cells = zip(accuracies, losses, best, strict=True)
        table.add_row(name, *(_cell(accuracy, loss, accuracy == top) for accuracy, loss, top in cells))
    console.print(table)


def condensed(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace the parts of more than ``WIDEST`` clients by two: means over a model's own clients, and over the others.

    >>> cells = {"accuracy": [[0.5, 1.0, *[0.2] * 5, *[0.4] * 5]], "loss": [[1.0] * 12], "samples": [5, *[1] * 11]}
    >>> parts = ["test", *(f"client_{client}" for client in range(11))]
    >>> found = condensed({"round": 1, "models": ["a"], "own": [["client_0"]], "parts": parts, **cells})
    >>> found["parts"], [round(value, 9) for value in found["accuracy"][0]]
    (['test', 'own clients', 'other clients'], [0.5, 1.0, 0.3])
    """
    parts, owns = figures["parts"], figures["own"]
    clients = [place for place, name in enumerate(parts) if name.startswith("client_")]
    if len(clients) <= WIDEST:
        return {**figures, "samples": [f"n {count}" for count in figures["samples"]]}
    rest = [place for place in range(len(parts)) if place not in clients]

    def row(values: Sequence[float], own: Collection[str]) -> list[float]:
        mine = [values[place] for place in clients if parts[place] in own]
        others = [values[place] for place in clients if parts[place] not in own]
        return [*(values[place] for place in rest), *(fmean(part) if part else nan for part in (mine, others))]

    return {
        **figures,
        "parts": [*(parts[place] for place in rest), "own clients", "other clients"],
        "samples": [*(f"n {figures['samples'][place]}" for place in rest), "mean", "mean"],
        **{key: [row(*pair) for pair in zip(figures[key], owns, strict=True)] for key in ("accuracy", "loss")},
    }


def print_export(folder: Path, inventory: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the written adapters, and how one is loaded."""
    console = console_of(console)
    table = Table("adapter", "round", "clients", "folder")
    for entry in inventory["adapters"]:
        table.add_row(entry["name"], str(entry["round"]), _numbers(entry["clients"]), entry["folder"])
    console.print(table)
    console.print(f"to load one: {inventory['adapters'][0]['load']}", soft_wrap=True, markup=False)
    console.print(str(folder), soft_wrap=True, markup=False)


def print_answers(answers: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Print answers side by side: one row a model."""
    table = Table("adapter", "answer", show_lines=True)
    for name, text in answers:
        table.add_row(name, repr(text)[1:-1])  # a control character would be the terminal's
    console_of(console).print(table, markup=False)


def _cell(accuracy: float, loss: float, best: bool) -> str:
    text = "-" if isnan(accuracy) else f"{accuracy:.1%}\n{loss:.3g}"
    return f"[bold]{text}[/bold]" if best else text


def _numbers(numbers: Iterable[int]) -> str:
    """Write numbers, neighbours as a range.

    >>> _numbers([0, 1, 2, 5, 7, 8]), _numbers([])
    ('0 to 2, 5, 7, 8', 'none')
    """
    groups = list[list[int]]()
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    words = [f"{g[0]} to {g[-1]}" if len(g) > 2 else ", ".join(map(str, g)) for g in groups]
    return ", ".join(words) or "none"
