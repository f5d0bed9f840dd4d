"""A CSV file with several lines a round, appended when the round closes; after a resume each round stands once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


class RoundLines:
    """The file; its first column is the round.

    Args:
        columns: names of the columns, as they stand in the first line.
        path: where; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, columns: str, path: Path | None = None) -> None:
        self.columns, self.path = columns, path

    def append(self, lines: Iterable[str]) -> None:
        """Append the lines of a closed round in one write, which a kill cannot tear."""
        if self.path is None:
            return
        head = "" if self.path.is_file() else self.columns + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write((head + "".join(lines)).encode())

    def drop_from(self, round: int) -> None:
        """Forget this round and those after it, and a line that a kill has torn."""
        if self.path is None or not self.path.is_file():
            return
        whole = self.path.read_text(encoding="utf-8")
        head, *lines = whole[: whole.rfind("\n") + 1].splitlines(keepends=True) or [self.columns + "\n"]
        kept = [line for line in lines if int(line.split(",", 1)[0]) < round]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(head + "".join(kept), encoding="utf-8")
        os.replace(part, self.path)
