"""traffic.csv: what each client of each round sent and received, in bytes by what they were for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsparse.federation.wire import Size

COLUMNS = (
    "round,client,up_header,up_positions,up_values,down_header,down_positions,down_values,first_contact,dense,seconds"
)


@dataclass(frozen=True)
class Entry:
    """One client in one round.

    Attributes:
        client: its id.
        up: bytes that it sent.
        down: bytes that it received, without a first model.
        first: bytes of the first model and the mask, if they came now; else 0.
        dense: bytes that it would have sent with every coordinate.
        seconds: time on the link.

    """

    client: int
    up: Size
    down: Size
    first: int
    dense: int
    seconds: float

    def line(self, round: int) -> str:
        """The row of a closed round, counted from 1."""
        sizes = [n for size in (self.up, self.down) for n in (size.header, size.positions, size.values)]
        return ",".join(map(str, [round, self.client, *sizes, self.first, self.dense, f"{self.seconds:.6g}"])) + "\n"


class Traffic:
    """The file. A round is appended in one write; after a resume each round stands once.

    Args:
        path: where; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def write(self, round: int, entries: Sequence[Entry]) -> None:
        """Append a closed round."""
        if self.path is None:
            return
        head = "" if self.path.is_file() else COLUMNS + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write((head + "".join(entry.line(round) for entry in entries)).encode())

    def drop_from(self, round: int) -> None:
        """Forget this round and those after it, and a line that a kill has torn."""
        if self.path is None or not self.path.is_file():
            return
        whole = self.path.read_text(encoding="utf-8")
        head, *lines = whole[: whole.rfind("\n") + 1].splitlines(keepends=True) or [COLUMNS + "\n"]
        kept = [line for line in lines if int(line.split(",", 1)[0]) < round]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(head + "".join(kept), encoding="utf-8")
        os.replace(part, self.path)
