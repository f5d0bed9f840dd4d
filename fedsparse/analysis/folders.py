"""Run folders as plain data: what is finished is read, what is not is named with its reason; nothing is executed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsparse.analysis.files import finite, flatten, json_of, yaml_of
from fedsparse.federation.csv import read_rows

_CONFIG = ".hydra/config.yaml"
_NAMED = ("mask_rule", "partition")
_FIGURES = ("val/acc", "test/acc", "trainable_fraction", "bytes_up", "bytes_total", "seed")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: its folder, relative to the folder that was asked for.
        folder: where it lies.
        summary: summary.json.
        config: .hydra/config.yaml with dotted keys and its values as text, and the choices ``data`` and ``model``.
        lr: learning rate of the clients.
        sparsity: fraction of the counted coordinates that is frozen, 0 without a mask.
        rows: metrics.csv, one mapping a round; empty where it is missing.

    """

    name: str
    folder: Path
    summary: Mapping[str, Any]
    config: Mapping[str, str]
    lr: float
    sparsity: float
    rows: list[dict[str, float]] = field(repr=False)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.summary["seed"])


@dataclass(frozen=True, order=True)
class Problem:
    """A folder, or a part of it, that the report leaves out."""

    name: str
    reason: str


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[Problem]]:
    """Read every run below some folders, each once, in an order that depends on names alone.

    Args:
        folders: run folders, or folders that hold some at any depth.

    Returns:
        The finished runs, and what was left out.

    Raises:
        ValueError: there is no finished run.

    """
    listed = [Path(folder) for folder in folders]
    runs: list[Run] = []
    problems: list[Problem] = []
    for name, folder in sorted(_names(listed).items()):
        try:
            runs.append(_read(name, folder))
            problems += [Problem(name, reason) for reason in _doubts(runs[-1])]
        except (ValueError, OSError, RecursionError) as error:
            problems.append(Problem(name, _line(error)))
    if not runs:
        why = "".join(f"; {problem.name}: {problem.reason}" for problem in problems[:1])
        raise ValueError(f"no finished run (summary.json) below {', '.join(map(str, listed))}{why}")
    return runs, sorted(problems)


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name every run folder relative to the folder it was found in; with several, under that one's own name."""
    places = {folder.resolve() for folder in folders}
    roots = sorted((p for p in places if places.isdisjoint(p.parents)), key=lambda place: (place.name, place))
    names: dict[str, Path] = {}
    for root in roots:
        found = {path.parent.parent for path in root.rglob(_CONFIG)} | {p.parent for p in root.rglob("summary.json")}
        for folder in sorted(found):
            relative = folder.relative_to(root if len(roots) == 1 else root.parent)
            names[_free(names, relative.as_posix())] = folder
    return names


def _free(names: Mapping[str, Path], name: str) -> str:
    """Number a name that is taken: two folders of the same name lie in different places."""
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(names) + 3))) if n not in names)


def _read(name: str, folder: Path) -> Run:
    """Read one folder, or say in a ValueError why it does not count."""
    config = flatten(yaml_of(folder / _CONFIG))
    if not (folder / "summary.json").is_file():
        raise ValueError(f"not finished: no summary.json after {_progress(folder, config)}")
    summary = _checked(json_of(folder / "summary.json"))
    config |= {group: _choice(group, folder, summary) for group in ("data", "model", "experiment")}
    return Run(name, folder, summary, config, _lr(config), _sparsity(summary, config), _metrics(folder))


def _checked(summary: dict[str, Any]) -> dict[str, Any]:
    """Refuse a summary without the figures that every table needs."""
    missing = [key for key in (*_NAMED, *_FIGURES) if summary.get(key) is None]
    if missing:
        raise ValueError(f"summary.json lacks {', '.join(missing)}")
    wrong = [key for key in _FIGURES if not finite(summary[key])]
    if wrong:
        raise ValueError(f"summary.json holds no finite number for {', '.join(wrong)}")
    return summary | {key: str(summary[key]) for key in _NAMED}


def _choice(group: str, folder: Path, summary: Mapping[str, Any]) -> str:
    """Find a group's option: summary.json names it; older folders keep it in Hydra's own file, or not at all."""
    try:
        stored = summary.get(group) or yaml_of(folder / ".hydra/hydra.yaml")["hydra"]["runtime"]["choices"][group]
    except (ValueError, KeyError, TypeError):
        return ""
    return "" if stored in (None, "None") else str(stored)


def _lr(config: Mapping[str, str]) -> float:
    text = config.get("optimizer.lr", "nothing")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"optimizer.lr in {_CONFIG} must be a number, not {text}") from None


def _sparsity(summary: Mapping[str, Any], config: Mapping[str, str]) -> float:
    stored = summary.get("sparsity")
    if stored is None:
        stored = 0 if summary["mask_rule"] == "dense" else config.get("sparsity.ratio", 0)
    try:
        return round(float(stored), 4)
    except (TypeError, ValueError):
        raise ValueError(f"sparsity must be a number from 0 to 1, not {stored}") from None


def _metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.csv"
    rows = read_rows(path) if path.is_file() else []
    return [{key: value for key, value in row.items() if math.isfinite(value)} for row in rows]


def _progress(folder: Path, config: Mapping[str, str]) -> str:
    rows = _metrics(folder)
    return f"round {int(rows[-1]['round']) if rows else 0} of {config.get('federation.rounds', 'an unknown number')}"


def _doubts(run: Run) -> Iterable[str]:
    """Say what a finished run cannot contribute to curves."""
    last, rounds = int(run.rows[-1]["round"]) if run.rows else 0, run.summary.get("rounds", 0)
    if not run.rows:
        yield "metrics.csv is missing or damaged: the run is in the tables, not in the curves"
    elif finite(rounds) and last < rounds:
        yield f"metrics.csv is damaged: it ends after round {last} of {rounds}"


def _line(error: BaseException) -> str:
    """Say it in one line, without the place where the folder happens to lie."""
    if isinstance(error, OSError):
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    return "its configuration refers to itself" if isinstance(error, RecursionError) else " ".join(str(error).split())
