"""Sparse exchanges in order: where they ran, their lines through the fractions, and what they stand beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedsparse.analysis.baseline import protocol
from fedsparse.analysis.exchange import rule_of, variant_of
from fedsparse.analysis.files import finite
from fedsparse.analysis.table import Row, locally, parts
from fedsparse.analysis.tables import share

Place = tuple[str, str, str, str]  # data, model, partition, length
Line = tuple[str, str]  # what is chosen by, and what else tells it from others

_HIDDEN = ("exchange=", "aggregation=", "aggregation.")


def places(table: Sequence[Row]) -> dict[Place, list[Row]]:
    """Give the rows of each data set, model, partition and length where a sparse exchange ran.

    References among them are those that share all but the mask and the exchange with one that is sparse.
    """
    found = {}
    for place in sorted({_place(row) for row in table if row.exchange}):
        rows = [row for row in table if _place(row) == place]
        shared = [protocol(row) for row in rows if row.exchange]
        found[place] = locally([row for row in rows if row.exchange or protocol(row) in shared])
    return found


def lines(shown: Sequence[Row]) -> dict[Line, list[Row]]:
    """Give sparse exchanges of a place as lines: rows that differ in the fraction alone, the smallest first."""
    found: dict[Line, list[Row]] = {}
    for row in sorted((row for row in shown if row.exchange), key=lambda row: (line_of(row), sent_fraction(row))):
        found.setdefault(line_of(row), []).append(row)
    return found


def line_of(row: Row) -> Line:
    """Say on which line a row with a sparse exchange lies: its rule, and how the rest of its name goes on."""
    summary = row.runs[0].summary
    rest = _elsewhere(row.name.replace(row.exchange, variant_of(summary), 1), row)
    return rule_of(summary), ", ".join(rest + _frozen(row))


def references(shown: Sequence[Row]) -> dict[str, Row]:
    """Name the rows of a place without a sparse exchange by what trains; how it is sent only if names would clash."""
    rows = [row for row in shown if not row.exchange]
    full = [_elsewhere(row.name, row) for row in rows]
    brief = [[part for part in name if not part.startswith(_HIDDEN)] for name in full]
    named = [
        (", ".join(b + _frozen(r)), ", ".join(f + _frozen(r)), r) for b, f, r in zip(brief, full, rows, strict=True)
    ]
    short = [name for name, _, _ in named]
    return {name if short.count(name) == 1 else long: row for name, long, row in named}


def sent_fraction(row: Row) -> float:
    """Give the fraction that a row sends; infinity where its rule has none."""
    value: Any = row.runs[0].summary.get("exchange_fraction")
    return value if finite(value) else math.inf


def _place(row: Row) -> Place:
    return (*row.task, row.partition, row.length)


def _elsewhere(name: str, row: Row) -> list[str]:
    """Split a name into its parts, without those that its place says."""
    return [part for part in parts(name) if part and part not in row.task]


def _frozen(row: Row) -> list[str]:
    return [f"{share(row.sparsity)} frozen"] if row.sparsity else []
