"""Run folders and archives as plain data: what is finished is read, what is not is named with its reason.

Nothing is executed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsparse.analysis import archive
from fedsparse.analysis.archive import Stored, is_archive
from fedsparse.analysis.files import finite, flatten, json_of, plain_yaml, short, yaml_of
from fedsparse.core.folder import CALIBRATION, CHECKPOINTS, CONFIG, HYDRA, METRICS, OVERRIDES, SUMMARY
from fedsparse.core.rows import read_rows

_LARGEST, _WIDEST = 1 << 28, 5000  # bytes and columns of a metrics.csv that is read
_OF_RUNS = (SUMMARY, METRICS, CHECKPOINTS)
_NAMED = ("mask_rule", "partition")
_SHARES = ("val/acc", "test/acc", "trainable_fraction")
_FIGURES = ("val/acc", "test/acc", "trainable_fraction", "bytes_up", "bytes_total", "seed")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: its folder, relative to the folder that was asked for.
        folder: where it lies; of a run of an archive there is none.
        summary: summary.json.
        config: .hydra/config.yaml with dotted keys and its values as text, and the choices ``data``, ``model``,
            ``experiment`` and ``method``.
        lr: learning rate of the clients.
        sparsity: fraction of the counted coordinates that is frozen, 0 without a mask.
        rows: metrics.csv, one mapping a round; empty where it is missing.
        options: the chosen option of each group; empty where older folders lack them.
        typed: the keys and groups that were typed; None where that is not stored.
        archived: whether it was read from an archive, so that its mask and its landscapes are not there.

    """

    name: str
    folder: Path
    summary: Mapping[str, Any]
    config: Mapping[str, str]
    lr: float
    sparsity: float
    rows: list[dict[str, float]] = field(repr=False)
    options: Mapping[str, str]
    typed: frozenset[str] | None
    archived: bool = False

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.summary["seed"])


@dataclass(frozen=True, order=True)
class Problem:
    """A folder, or a part of it, that the report leaves out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """A run folder, finished or not.

    Attributes:
        name: relative to the folder that was asked for.
        folder: where it lies.
        run: what it holds; None where it does not count.
        reasons: why it does not count, or what it cannot contribute.
        stored: what a run that counts has left.

    """

    name: str
    folder: Path
    run: Run | None
    reasons: tuple[str, ...]
    stored: Stored | None = None


def as_stored(config: Any) -> Any:
    """Leave a stored configuration as it is."""
    return config


def read_runs(folders: Iterable[Path], renewed: Callable[[Any], Any] = as_stored) -> tuple[list[Run], list[Problem]]:
    """Read every finished run below some folders, each once, in an order that depends on names alone.

    Args:
        folders: run folders, folders that hold some at any depth, or archives that ``save`` wrote.
        renewed: writes a stored configuration in today's keys, as ``job.earlier.renewed`` does, which stands above;
            by default it is read as it was stored.

    Returns:
        The finished runs, and what was left out.

    Raises:
        ValueError: there is no finished run.

    """
    listed = [Path(folder) for folder in folders]
    found = find_runs(listed, renewed)
    runs = [one.run for one in found if one.run is not None]
    problems = [Problem(one.name, reason) for one in found for reason in one.reasons]
    if not runs:
        why = "".join(f"; {problem.name}: {problem.reason}" for problem in problems[:1])
        raise ValueError(f"no finished run (summary.json) below {', '.join(map(str, listed))}{why}")
    return runs, sorted(problems)


def find_runs(folders: Iterable[Path], renewed: Callable[[Any], Any] = as_stored) -> list[Found]:
    """Read every run folder below some folders, finished or not; arguments and order as in ``read_runs``.

    Raises:
        ValueError: an archive cannot be read.

    """
    given = [Path(folder) for folder in folders]
    found = [found for path in given if is_archive(path) for found in _archived(path, renewed)]
    for name, folder in sorted(_names([path for path in given if not is_archive(path)]).items()):
        try:
            stored = _read(name, folder, renewed)
            run = _run(stored, folder, renewed)
            found.append(Found(name, folder, run, tuple(_doubts(run)), stored))
        except Exception as error:  # whatever a damaged folder leads to, the others are read
            found.append(Found(name, folder, None, (problem_line(error),)))
    return found


def save(folders: Iterable[Path], path: Path, renewed: Callable[[Any], Any] = as_stored) -> None:
    """Write every finished run of some folders and archives into one archive, as it was stored.

    Which runs count is what ``read_runs`` says of the same arguments.

    Raises:
        ValueError: an archive cannot be read, or the file's name is none of one.
        OSError: the file cannot be written.

    """
    archive.write((one.stored for one in find_runs(folders, renewed) if one.stored is not None), path)


def _archived(path: Path, renewed: Callable[[Any], Any]) -> Iterable[Found]:
    for stored in archive.read(path):
        place = path / stored.name
        try:
            run = replace(_run(stored, place, renewed), archived=True)
            yield Found(stored.name, place, run, tuple(_doubts(run)), stored)
        except Exception as error:  # as of a folder
            yield Found(stored.name, place, None, (problem_line(error),))


def choices(folder: Path) -> dict[str, str]:
    """Read the option of every group from Hydra's own file; nothing where older folders lack it, or it is damaged."""
    try:
        stored = dict(yaml_of(folder / HYDRA)["hydra"]["runtime"]["choices"])
    except (ValueError, KeyError, TypeError, OSError):
        return {}
    chosen = {str(group): str(option) for group, option in stored.items() if option is not None}
    return {short(group): short(o) for group, o in chosen.items() if "/" not in group and o not in ("None", "null")}


def overrides(folder: Path) -> list[str] | None:
    """Read what was typed; None where that is not stored, or damaged."""
    try:
        typed = plain_yaml(folder / OVERRIDES)
    except (ValueError, OSError):
        return None
    return [str(override) for override in typed] if isinstance(typed, list) else None


def _keys(typed: list[str] | None) -> frozenset[str] | None:
    """Take the keys and groups out of overrides, such as ``seed=1`` and ``+phases.fine_tune={rounds: 5}``."""
    return None if typed is None else frozenset(short(o.lstrip("+~").partition("=")[0]) for o in typed)


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name every run folder relative to the folder it was found in; with several, under that one's own name."""
    places = {Path(os.path.realpath(folder)) for folder in folders}
    roots = sorted((p for p in places if places.isdisjoint(p.parents)), key=lambda place: (place.name, place))
    names: dict[str, Path] = {}
    for root in roots:
        found = {path.parent.parent for path in root.rglob(CONFIG)} | {p.parent for p in root.rglob(SUMMARY)}
        for folder in sorted(folder for folder in found if not _calibrated(folder)):
            relative = folder.relative_to(root if len(roots) == 1 else root.parent)
            names[_free(names, relative.as_posix())] = folder
    return names


def _calibrated(folder: Path) -> bool:
    """Whether a folder holds a calibration alone, which is finished and no run."""
    return (folder / CALIBRATION).exists() and not any((folder / name).exists() for name in _OF_RUNS)


def _free(names: Mapping[str, Path], name: str) -> str:
    """Number a name that is taken: two folders of the same name lie in different places."""
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(names) + 3))) if n not in names)


def _read(name: str, folder: Path, renewed: Callable[[Any], Any]) -> Stored:
    """Read one folder, or say in a ValueError why it does not count."""
    if not (folder / SUMMARY).is_file():
        progress = _progress(folder, _flat(renewed(yaml_of(folder / CONFIG))))
        raise ValueError(f"not finished: no summary.json after {progress}")
    config, summary = yaml_of(folder / CONFIG), json_of(folder / SUMMARY)
    return Stored(name, overrides(folder), summary, choices(folder), config, _metrics(folder))


def _run(stored: Stored, folder: Path, renewed: Callable[[Any], Any]) -> Run:
    config = _flat(renewed(stored.config))
    summary, options = _checked(dict(stored.summary)), stored.options
    config |= {group: _choice(group, options, summary) for group in ("data", "model", "experiment", "method")}
    lr, sparsity, typed = _lr(config), _sparsity(summary, config), _keys(stored.overrides)
    return Run(stored.name, folder, summary, config, lr, sparsity, stored.rounds, options, typed)


def _flat(config: Any) -> dict[str, str]:
    return {short(key): short(value) for key, value in flatten(config).items()}


def _checked(summary: dict[str, Any]) -> dict[str, Any]:
    """Refuse a summary without the figures that every table needs."""
    missing = [key for key in (*_NAMED, *_FIGURES) if summary.get(key) in (None, "")]
    if missing:
        raise ValueError(f"summary.json lacks {', '.join(missing)}")
    wrong = [key for key in _FIGURES if not finite(summary[key])]
    if wrong:
        raise ValueError(f"summary.json holds no finite number for {', '.join(wrong)}")
    if outside := [key for key in _SHARES if not 0 <= summary[key] <= 1]:
        raise ValueError(f"summary.json holds no number from 0 to 1 for {', '.join(outside)}")
    if not (summary["seed"] >= 0 and float(summary["seed"]).is_integer()):
        raise ValueError("summary.json holds no whole number of 0 or more for seed")
    texts = {key: short(value) for key, value in summary.items() if isinstance(value, str)}
    return summary | texts | {key: short(str(summary[key])) for key in _NAMED}


def _choice(group: str, options: Mapping[str, str], summary: Mapping[str, Any]) -> str:
    """Find a group's option: summary.json names it; older folders keep it in Hydra's own file, or not at all."""
    stored = summary.get(group) or options.get(group)
    return "" if stored in (None, "None") else short(str(stored))


def _lr(config: Mapping[str, str]) -> float:
    text = config.get("optimizer.lr", "nothing")
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"optimizer.lr in {CONFIG} must be a number, not {text}")
    return rate


def _sparsity(summary: Mapping[str, Any], config: Mapping[str, str]) -> float:
    stored = summary.get("sparsity")
    if stored is None:
        stored = 0 if summary["mask_rule"] == "dense" else config.get("sparsity.ratio", 0)
    try:
        sparsity = float(stored)
    except (TypeError, ValueError, OverflowError):
        sparsity = math.nan
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a number from 0 to 1, not {stored}")
    return round(sparsity, 4)


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Read the rounds of a run, without what is no figure; nothing of a file that no run has written."""
    path = folder / METRICS
    if not path.is_file() or path.stat().st_size > _LARGEST or _columns(path) > _WIDEST:
        return []
    rows = [row for row in read_rows(path) if 0 < row["round"] < 1e9]
    return [{key: value for key, value in row.items() if finite(value)} for row in rows]


def _columns(path: Path) -> int:
    with path.open("rb") as file:
        return file.readline(1 << 20).count(b",") + 1


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


def problem_line(error: BaseException) -> str:
    """Say it in one line, without the place where the folder happens to lie."""
    if isinstance(error, OSError):
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    if isinstance(error, RecursionError):
        return "its configuration refers to itself"
    return short(" ".join(str(error).split()) or type(error).__name__)
