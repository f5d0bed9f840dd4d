"""A CSV file with several lines a round, appended when the round closes; after a resume no round is there twice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from fedsparse.core import files


class RoundLines:
    """A CSV file whose first column is the round.

    Args:
        columns: names of the columns, comma-separated, without a line end.
        path: of the file; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, columns: str, path: Path | None = None) -> None:
        self.columns, self.path = columns, path
        self._whole = False  # whether this object wrote the file, so that lines may be appended

    def append(self, lines: Iterable[str]) -> None:
        """Append the lines of a closed round, all or none."""
        if self.path is None:
            return
        if not self._whole:
            self._keep(math.inf)
        files.append(self.path, "".join(lines).encode())

    def drop_from(self, round: int) -> None:
        """Remove the lines of this and later rounds, and all after a damaged line."""
        if self.path is not None and self.path.is_file():
            self._keep(round)

    def _keep(self, rounds: float) -> None:
        """Rewrite the file with the lines of the rounds before this one."""
        assert self.path is not None
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)[1:]
        kept = takewhile(lambda line: line.split(",", 1)[0].isdecimal(), lines)
        files.write(
            self.path, "".join([self.columns + "\n", *(line for line in kept if int(line.split(",", 1)[0]) < rounds)])
        )
        self._whole = True
