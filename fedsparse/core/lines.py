"""A CSV file with several lines a round, appended when the round closes; after a resume each round stands once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from fedsparse.core import files


class RoundLines:
    """The file; its first column is the round.

    Args:
        columns: names of the columns, as they stand in the first line.
        path: where; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, columns: str, path: Path | None = None) -> None:
        self.columns, self.path = columns, path
        self._whole = False  # whether the file is what was written here, so that lines may be appended

    def append(self, lines: Iterable[str]) -> None:
        """Append the lines of a closed round, all or none."""
        if self.path is None:
            return
        if not self._whole:
            self._keep(math.inf)
        files.append(self.path, "".join(lines).encode())

    def drop_from(self, round: int) -> None:
        """Forget this round and those after it, and what follows a damaged line."""
        if self.path is not None and self.path.is_file():
            self._keep(round)

    def _keep(self, rounds: float) -> None:
        """Write the file anew with the lines of the rounds before this one."""
        assert self.path is not None
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)[1:]
        kept = takewhile(lambda line: line.split(",", 1)[0].isdecimal(), lines)
        files.write(
            self.path, "".join([self.columns + "\n", *(line for line in kept if int(line.split(",", 1)[0]) < rounds)])
        )
        self._whole = True
