"""metrics.csv: one row a round, written whole; after a resume no round is there twice."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fedsparse.core import files
from fedsparse.core.folder import METRICS
from fedsparse.core.rows import KEY, read_rows


class RoundCSV(Logger):
    """Lightning logger of one CSV file. Columns are in the order of their first appearance, after ``round``.

    A new last row without new columns is appended, whole or not at all; every other change rewrites the file.
    An existing file is read and continued. In a run of several processes the first one writes.

    Args:
        folder: of the file; created when the first row is written.
        filename: its name.

    """

    def __init__(self, folder: str | Path, filename: str = METRICS) -> None:
        super().__init__()
        self.path = Path(folder) / filename
        known = read_rows(self.path) if self.path.is_file() else []
        self._rows: dict[int, dict[str, float]] = {int(row[KEY]): row for row in known}
        self._whole = False  # whether this object wrote the file, so that a line may be appended
        self._format()

    @property
    def name(self) -> str:
        """Empty, as Lightning uses it as the name of a folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as a run folder has one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @property
    def rows(self) -> list[dict[str, float]]:
        """Copies of the rows, by round."""
        return [dict(self._rows[step]) for step in sorted(self._rows)]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a round's row, or add figures to it.

        Args:
            metrics: figures by name; numbers, or tensors of one element.
            step: the round; by default the one after the last.

        """
        step = max(self._rows, default=0) + 1 if step is None else step
        last = step > max(self._rows, default=step)
        row = self._rows.setdefault(step, {KEY: step})
        row.update({name: _number(value) for name, value in metrics.items() if name != KEY})
        known = row.keys() <= self._columns.keys()
        if known:
            self._lines[step] = self._line(row)
        else:
            self._format()
        self._append(step) if known and last and self._whole else self._write()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in the run folder."""

    @rank_zero_only
    def drop_from(self, step: int) -> None:
        """Remove the rows of this and later rounds, which a resume repeats.

        Args:
            step: first round to remove.

        """
        kept = {round_: row for round_, row in self._rows.items() if round_ < step}
        if len(kept) < len(self._rows):
            self._rows = kept
            self._format()
            self._write()

    @rank_zero_only
    def save(self) -> None:
        """Do nothing: every change is written at once."""

    def _format(self) -> None:
        """Collect the columns, and format every line."""
        self._columns = dict.fromkeys([KEY, *(name for row in self._rows.values() for name in row)])
        self._lines = {step: self._line(row) for step, row in self._rows.items()}

    def _line(self, row: Mapping[str, float]) -> str:
        return ",".join([repr(row[name]) if name in row else "" for name in self._columns]) + "\n"

    def _append(self, step: int) -> None:
        files.append(self.path, self._lines[step].encode())

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        files.write(self.path, text.getvalue() + "".join([self._lines[step] for step in sorted(self._lines)]))
        self._whole = True


def _number(value: Any) -> float:
    """Convert a number of any type, or a tensor of one element, to int or float."""
    return int(value) if isinstance(value, Integral) else float(value)
