"""Reads a CSV file with one row a round; a report reads it without Lightning, whose logger writes it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

KEY = "round"


def read_rows(path: str | Path) -> list[dict[str, float]]:
    """Read a table of rounds; integers stay integers, and an empty cell is left out of its row.

    A damaged file is read up to the first line that has no end or does not fit the header.

    Args:
        path: the file, as ``fedsparse.simulation.csv_logger.RoundCSV`` writes it.

    Returns:
        The rows in the order of the file, each with its ``round``.

    Raises:
        FileNotFoundError: there is no such file.

    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # what follows the last line end may be half a number
    return list(_parse(whole))


def _parse(text: str) -> Iterator[dict[str, float]]:
    """Yield rows up to the first line that does not fit the header."""
    reader = csv.reader(io.StringIO(text))
    try:
        header = next(reader, [])
        for cells in reader:
            row = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            yield {KEY: int(row.pop(KEY)), **{name: _value(cell) for name, cell in row.items()}}
    except (ValueError, KeyError, csv.Error):
        return


def _value(text: str) -> float:
    """Read an integer as an integer, anything else as a float."""
    try:
        return int(text)
    except ValueError:
        return float(text)
