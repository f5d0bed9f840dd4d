"""What crossed the network: lengths of payloads in bytes, by client and round, and the time that they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedsparse.core.checks import check_number
from fedsparse.core.lines import RoundLines
from fedsparse.federation.exchange.wire.message import Size

COLUMNS = (
    "round,client,up_header,up_positions,up_values,down_header,down_positions,down_values,first_contact,dense,seconds"
)
_UNSTORED = ("link", "entries")


@dataclass(frozen=True)
class Link:
    """A client's connection to the server (``conf/link``); all clients of a round send at once, each on its own.

    Args:
        up: Mbit/s from the client.
        down: Mbit/s to the client.
        latency: seconds that a message is under way, each time one is sent.

    Raises:
        ValueError: a rate that is not above 0, or a negative latency.

    """

    up: float
    down: float
    latency: float

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_number("link.up", self.up, least=1e-9)
        check_number("link.down", self.down, least=1e-9)
        check_number("link.latency", self.latency, least=0)

    def seconds(self, up: int, down: int) -> float:
        """Time of one message down and one up, of so many bytes.

        >>> Link(up=8.0, down=16.0, latency=0.5).seconds(up=1_000_000, down=1_000_000)
        2.5
        """
        return 2 * self.latency + 8e-6 * (down / self.down + up / self.up)


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
    """traffic.csv: what each client of each round sent and received, in bytes by what they were for.

    Args:
        path: where; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(COLUMNS, path)

    def write(self, round: int, entries: Sequence[Entry]) -> None:
        """Append a closed round."""
        self.append(entry.line(round) for entry in entries)


@dataclass
class Ledger:
    """Bytes of a run.

    Attributes:
        bytes_up: what clients sent in training rounds.
        bytes_down: what they received in training rounds.
        bytes_dense: the uplink if every payload carried every coordinate.
        bytes_setup_up: what clients sent for head and calibration.
        bytes_setup_down: first model, mask, and what clients received for head and calibration.
        has_model: clients that hold the first model.
        has_mask: clients that hold the mask.
        link_seconds: time that training rounds would take on the link, each as long as its slowest client.
        client_steps: local steps of all clients; gradients taken for head and calibration are steps too.
        round_steps: those of the rounds alone.
        clipped_steps: how many of these had their gradient clipped.
        link: the link; None for no time.
        entries: the clients of the round that is open.

    """

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_dense: int = 0
    bytes_setup_up: int = 0
    bytes_setup_down: int = 0
    has_model: set[int] = field(default_factory=set)
    has_mask: set[int] = field(default_factory=set)
    link_seconds: float = 0.0
    client_steps: int = 0
    round_steps: int = 0
    clipped_steps: int = 0
    link: Link | None = None
    entries: list[Entry] = field(default_factory=list)

    @property
    def bytes_total(self) -> int:
        """All that crossed the network."""
        return self.bytes_up + self.bytes_down + self.bytes_setup_up + self.bytes_setup_down

    def first_model(self, clients: Iterable[int], length: int) -> None:
        """Count the first model for clients that do not hold it yet."""
        new = set(clients) - self.has_model
        self.bytes_setup_down += length * len(new)
        self.has_model |= new

    def mask(self, clients: Iterable[int], length: int) -> None:
        """Count the mask for clients that do not hold it yet."""
        new = set(clients) - self.has_mask
        self.bytes_setup_down += length * len(new)
        self.has_mask |= new

    def setup(self, clients: int, up: int, down: int) -> None:
        """Count messages of so many clients for head or calibration."""
        self.bytes_setup_up += clients * up
        self.bytes_setup_down += clients * down

    def stepped(self, steps: int, clipped: int) -> None:
        """Count local steps of a round, and how many of them were clipped."""
        self.client_steps += steps
        self.round_steps += steps
        self.clipped_steps += clipped

    def trained(self, client: int, up: Size, down: Size, dense: int, first: int = 0, prepares: bool = False) -> None:
        """Count what a client of a round sent and received, and would have sent with every coordinate.

        What ``prepares`` (an exploration) is counted with head and calibration.
        """
        if prepares:
            self.setup(1, up.total, down.total)
        else:
            self.bytes_up += up.total
            self.bytes_down += down.total
            self.bytes_dense += dense
        seconds = self.link.seconds(up.total, down.total + first) if self.link else 0.0
        self.entries.append(Entry(client, up, down, first, dense, seconds))

    def close(self) -> list[Entry]:
        """Close a round: its entries, by client."""
        entries, self.entries = sorted(self.entries, key=lambda entry: entry.client), []
        self.link_seconds += max((entry.seconds for entry in entries), default=0.0)
        return entries

    def figures(self) -> dict[str, int]:
        """All byte figures by name."""
        names = ("bytes_up", "bytes_down", "bytes_dense", "bytes_setup_up", "bytes_setup_down", "bytes_total")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, which is written between rounds."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSTORED}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values of a checkpoint; an earlier version stored fewer."""
        self.bytes_up, self.bytes_down, self.bytes_dense = (state[f"bytes_{what}"] for what in ("up", "down", "dense"))
        self.bytes_setup_up, self.bytes_setup_down = state["bytes_setup_up"], state["bytes_setup_down"]
        self.has_model, self.has_mask = set(state["has_model"]), set(state["has_mask"])
        self.link_seconds, self.client_steps = state.get("link_seconds", 0.0), state.get("client_steps", 0)
        self.round_steps, self.clipped_steps = state.get("round_steps", 0), state.get("clipped_steps", 0)
