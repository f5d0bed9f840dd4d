"""What Weights & Biases shows of a run: its name, tags and options, and a table of its clients."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsparse.core.folder import CLIENTS
from fedsparse.job import shipped, trust
from fedsparse.job.parts import Problem
from fedsparse.job.sweep import MAY_DIFFER
from fedsparse.simulation.artifacts import Identity, Table

UNSAID = ("hydra", *(key for key in MAY_DIFFER if key != "federation.rounds"))  # keys that a name leaves out
SAID = ("data", "model", "partition", "mask_rule", "sparsity")  # groups whose options are tags as they are
LONGEST_NAME, LONGEST_TAG = 128, 64  # characters, limits of W&B
MOST_CLIENTS = 10_000  # rows that W&B shows of a table


def identity_of(folder: Path, choices: Mapping[str, str], group: str | None) -> Identity:
    """Name a run after what was typed, with its options as tags.

    Args:
        folder: the run folder, which holds the overrides.
        choices: option chosen of each config group.
        group: name shared by the runs of a sweep, or None.

    """
    options = {key: chosen(option) for key, option in choices.items()}
    return Identity(name_of(trust.overrides(folder)), tags_of(options), group, "train", options)


def chosen(option: str | None) -> str | None:
    """Convert the chosen option of a group; None where none is chosen."""
    return None if option in (None, "None", "null") else option


def name_of(overrides: Sequence[str]) -> str:
    """Join what was typed, but for keys that change no figure; ``default`` where nothing was.

    >>> name_of(["model=mlp", "logger.wandb.group=x", "+seed=1", "hydra.run.dir=runs/a"]), name_of(["pictures=false"])
    ('model=mlp seed=1', 'default')
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    said = [o.lstrip("+") for o, key in zip(overrides, keys, strict=True) if not trust.covers(UNSAID, key)]
    name = " ".join(said) or "default"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def tags_of(options: Mapping[str, str | None]) -> tuple[str, ...]:
    """List options as tags: those of data, model, partition, mask rule and sparsity, and others that are no default.

    >>> tags_of({"data": "digits", "server": "fedadam", "exchange": "masked", "experiment": None, "logger": "wandb"})
    ('digits', 'server=fedadam')
    """
    usual = shipped.defaults()
    said = [str(options[group]) for group in SAID if options.get(group)]
    others = [
        key for key, option in options.items() if key not in (*SAID, "logger") and option not in (None, usual.get(key))
    ]
    return tuple(tag[:LONGEST_TAG] for tag in [*said, *(f"{key}={options[key]}" for key in others)])


def clients_table(folder: Path, problem: Problem) -> Table:
    """List what each client holds, and its figures of the last round with some, as ``evaluation=per_client`` has.

    Args:
        folder: the run folder.
        problem: of the run.

    Returns:
        Columns ``client``, ``department`` (where the data names them), ``samples``, ``classes`` (with one at least, of
        labels), ``test_samples``, then ``<model>/<metric>``; and a row for each of the first 10,000 clients.

    """
    figures = _last_figures(folder / CLIENTS)
    known = list(dict.fromkeys(name for row in figures.values() for name in row))
    dataset, held = problem.dataset, dict[str, Sequence[Any]]()
    held["client"] = range(len(problem.parts))
    if problem.departments:
        held["department"] = problem.departments
    held["samples"] = [len(part) for part in problem.parts]
    if not dataset.sequences:
        held["classes"] = [len(np.unique(dataset.train.labels[part])) for part in problem.parts]
    held["test_samples"] = [len(part) for part in problem.tests]
    rows = [list(cells) for cells in zip(*held.values(), strict=True)][:MOST_CLIENTS]
    return [*held, *known], [[*row, *map(figures.get(row[0], {}).get, known)] for row in rows]


def _last_figures(path: Path) -> dict[int, dict[str, float]]:
    """Read the figures of the last round in ``clients.csv``, by client; empty without the file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    found: dict[int, dict[str, float]] = {}
    for row in (row for row in rows if row["round"] == rows[-1]["round"]):
        names = list(row)[list(row).index("n") + 1 :]
        figures = {f"{row['model']}/{name}": float(row[name]) for name in names if row[name]}
        found.setdefault(int(row["client"]), {}).update(figures)
    return found
