"""Finished runs in one file, a line each: what a report needs of them, without models, masks and checkpoints.

A gzipped CSV file: the name of the run folder, what was typed (``overrides.yaml``), every key of ``summary.json``
(seconds and sha256 among them), the options of Hydra's groups, ``config.yaml`` as it was stored, and the columns of
``metrics.csv``. Each cell but the name is JSON. Equal runs give equal bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsparse.core import files

ENDING = ".csv.gz"
_LARGEST = 1 << 28  # characters of all lines
# no key of a summary has these names, and some are those of the files
_FIRST, _LAST = ("run folder", "overrides.yaml"), ("hydra choices", "config.yaml", "metrics.csv")


@dataclass(frozen=True)
class Stored:
    """What a run has left, as it was stored.

    Attributes:
        name: of its folder.
        overrides: what was typed; None where that is not stored.
        summary: summary.json.
        options: the chosen option of each group; empty where older folders lack them.
        config: .hydra/config.yaml.
        rounds: metrics.csv, one mapping a round.

    """

    name: str
    overrides: list[str] | None
    summary: Mapping[str, Any]
    options: Mapping[str, str]
    config: Mapping[str, Any]
    rounds: list[dict[str, float]]


def is_archive(path: Path) -> bool:
    """Whether a path names an archive, and no folder."""
    return path.name.endswith(ENDING) and not path.is_dir()


def write(runs: Iterable[Stored], path: Path) -> None:
    """Write runs into an archive.

    Raises:
        ValueError: the file's name does not end as an archive's.
        OSError: it cannot be written.

    """
    if not path.name.endswith(ENDING):
        raise ValueError(f"{path} has to end in {ENDING}")
    listed = list(runs)
    figures = list(dict.fromkeys(key for run in listed for key in run.summary))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FIRST, *figures, *_LAST])
    for run in listed:
        shown = [_json(run.summary[key]) if key in run.summary else "" for key in figures]
        rest = (run.options, run.config, _columns(run.rounds))
        writer.writerow([run.name, _json(run.overrides), *shown, *map(_json, rest)])
    files.write(path, gzip.compress(text.getvalue().encode(), mtime=0))


def read(path: Path) -> list[Stored]:
    """Read the runs of an archive, in its order.

    Raises:
        ValueError: the file is missing, damaged or no archive; one line.

    """
    try:
        return list(_runs(_text(path)))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, csv.Error, RecursionError):
        raise ValueError(f"{path} is damaged, or was not written by fedsparse.report --save") from None


def _text(path: Path) -> str:
    with gzip.open(path) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError("no report writes so much")
    return content.decode()


def _runs(text: str) -> Iterator[Stored]:
    """Read the lines, whose cells may be longer than the csv module takes for sensible."""
    before = csv.field_size_limit(_LARGEST)
    try:
        lines = list(csv.reader(io.StringIO(text), strict=True))
    finally:
        csv.field_size_limit(before)
    head = lines[0]
    for cells in lines[1:]:
        line = dict(zip(head, cells, strict=True))
        name, *rest = (line.pop(key) for key in (*_FIRST, *_LAST))
        overrides, options, config, columns = map(json.loads, rest)
        summary = {key: json.loads(value) for key, value in line.items() if value}
        yield Stored(name, overrides, dict(summary), dict(options), dict(config), _rows(columns))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Turn rounds into columns, which compress better: None where a round has no figure."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _rows(columns: Mapping[str, list[float | None]]) -> list[dict[str, float]]:
    rounds = zip(*columns.values(), strict=True)
    return [{name: v for name, v in zip(columns, values, strict=True) if v is not None} for values in rounds]
