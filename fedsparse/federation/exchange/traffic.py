"""traffic.csv: what each client of each round sent and received, in bytes by what they were for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsparse.core.lines import RoundLines
from fedsparse.federation.exchange.wire.message import Size

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


class Traffic(RoundLines):
    """The file.

    Args:
        path: where; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(COLUMNS, path)

    def write(self, round: int, entries: Sequence[Entry]) -> None:
        """Append a closed round."""
        self.append(entry.line(round) for entry in entries)
