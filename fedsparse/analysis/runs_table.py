"""Runs as a table, one row a run: what was chosen, the figures of the run and of its landscape, or why there are none.

It takes the place of a store that all machines write to: run folders of several machines are read together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedsparse.analysis.files import finite, json_of, short, yaml_of
from fedsparse.analysis.folders import Found, as_stored, choices, find_runs, overrides, problem_line
from fedsparse.core.folder import CONFIG, LANDSCAPE, LANDSCAPE_FIGURES

_CURVATURE = ("trace", "trace_error", "frobenius", "frobenius_error")
_BARRIERS = ("loss_barrier", "accuracy_barrier")
Values = Mapping[str, Any]


def table(folders: Iterable[str | os.PathLike[str]], renewed: Callable[[Any], Any] = as_stored) -> Any:
    """Read runs as a table; equal folders give an equal one.

    Args:
        folders: run folders, or folders that hold some at any depth.
        renewed: see ``read_runs``.

    Returns:
        A pandas DataFrame where pandas is installed, else a list of dicts with the same columns in the same order and
        None where a run has no such figure. A row for each run folder (a calibration is no run), in the order of their
        names:

        - ``folder``: its name, relative to the folder that was asked for; ``finished``; ``problem``: why there are no
          figures, or what is wrong with some, else None; ``overrides``: what was typed;
        - the option of each group, such as ``data``, ``model``, ``partition``, ``mask_rule``, ``exchange``;
        - the seed and what summary.json holds, under its names, such as ``test/acc`` and ``bytes_total``. ``sparsity``
          is the fraction there, not the option;
        - of landscape/landscape.json, which is of the last round: ``landscape/round``, ``landscape/trace``,
          ``landscape/lambda_1``, ``landscape/<data>/<line>/loss_barrier/above_chord`` and other figures of barriers,
          ``landscape/sharpness/...``, ``landscape/<model>/<data>/loss``, ``landscape/distance/...``.

    Raises:
        ValueError: a folder holds no run.

    """
    listed = [Path(folder) for folder in folders]
    found = find_runs(listed, renewed)
    for top in listed:
        if not any(one.folder.is_relative_to(os.path.realpath(top)) for one in found):
            raise ValueError(f"no run (.hydra/config.yaml, summary.json) below {top}")
    rows = [_parts(one) for one in found]
    columns = list(dict.fromkeys(chain.from_iterable(chain.from_iterable(zip(*rows, strict=True)))))
    merged = [dict(chain.from_iterable(part.items() for part in reversed(row))) for row in rows]
    return _frame([{column: row.get(column) for column in columns} for row in merged], columns)


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> Any:
    """Make a DataFrame of rows; leave them as they are without pandas."""
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows, columns=columns)


def _parts(found: Found) -> tuple[Values, ...]:
    """Read a row, in the order of its columns; where two parts have one name the earlier one counts."""
    run, (landscape, why), typed = found.run, _landscape(found.folder), overrides(found.folder)
    own = {
        "folder": found.name,
        "finished": run is not None,
        "problem": "; ".join([*found.reasons, *why]) or None,
        "overrides": None if typed is None else " ".join(typed),
    }
    summary = _unfinished(found.folder) if run is None else {"seed": run.seed, "sparsity": run.sparsity, **run.summary}
    chosen = {group: summary.get(group, option) for group, option in choices(found.folder).items()}
    chosen.pop("sparsity", None)  # the option's name, where others have a fraction
    return own, chosen, summary, landscape


def _unfinished(folder: Path) -> Values:
    """Read from the configuration what a run without a summary has in common with the others: its seed."""
    try:
        seed = yaml_of(folder / CONFIG).get("seed")
    except (ValueError, OSError):
        seed = None
    return {"seed": seed if finite(seed) else None}


def _landscape(folder: Path) -> tuple[Values, Sequence[str]]:
    """Read the figures of a landscape, and say what is wrong with them; neither where none was measured."""
    path = folder / LANDSCAPE / LANDSCAPE_FIGURES
    try:
        figures = dict(_figures(json_of(path))) if os.path.lexists(path) else {}
    except Exception as error:  # whatever a damaged file leads to, the others are read
        return {}, [problem_line(error)]
    return {f"{LANDSCAPE}/{name}": value for name, value in figures.items()}, []


def _figures(tree: Values) -> Iterator[tuple[str, float]]:
    """Name the figures of a landscape.json that are finite."""
    curvature = _inner(tree, "curvature")
    values = curvature.get("eigenvalues")
    first = values[0] if isinstance(values, list) and values else None
    yield from _numbers({"round": tree.get("round"), "lambda_1": first})
    yield from _numbers({key: curvature.get(key) for key in _CURVATURE})
    for part in tree:
        kind, _, data = part.partition(" ")
        for line, found in _inner(tree, part, "lines").items() if kind == "lines" else ():
            yield from _numbers({barrier: _inner(found, barrier) for barrier in _BARRIERS}, f"{data}/{line}/")
    yield from _numbers({"sharpness": _inner(tree, "sharpness"), "distance": _inner(tree, "models", "distances")})
    yield from _numbers(_inner(tree, "models", "models"))


def _inner(tree: Any, *keys: str) -> Values:
    """Find a mapping in nested ones; an empty one where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def _numbers(tree: Values, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Name the finite numbers of nested mappings by their keys, joined by slashes."""
    for key, value in tree.items():
        name = short(f"{prefix}{key}")
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/")
        elif finite(value):
            yield name, value
