"""The ledger of traffic: lengths of messages in bytes, by client and round, and their time on a link."""

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
    """A client's connection to the server (``conf/link``); clients of a round send in parallel, each on one.

    Args:
        up: Mbit/s from the client.
        down: Mbit/s to the client.
        latency: seconds added to each message.

    Raises:
        ValueError: a rate that is not above 0, or a negative latency.

    """

    up: float
    down: float
    latency: float

    def __post_init__(self) -> None:
        """Check the options."""
        check_number("link.up", self.up, least=1e-9)
        check_number("link.down", self.down, least=1e-9)
        check_number("link.latency", self.latency, least=0)

    def seconds(self, up: int, down: int) -> float:
        """Compute the time of one message down and one up, of so many bytes.

        >>> Link(up=8.0, down=16.0, latency=0.5).seconds(up=1_000_000, down=1_000_000)
        2.5
        """
        return 2 * self.latency + 8e-6 * (down / self.down + up / self.up)


@dataclass(frozen=True)
class Entry:
    """The traffic of one client in one round.

    Attributes:
        client: its id.
        up: bytes sent.
        down: bytes received, without a first model.
        first: bytes of the first model and the mask, if received in this round; else 0.
        dense: bytes of the uplink with every coordinate.
        seconds: time on the link.

    """

    client: int
    up: Size
    down: Size
    first: int
    dense: int
    seconds: float

    def line(self, round: int) -> str:
        """Format the CSV line of a closed round, counted from 1."""
        sizes = [n for size in (self.up, self.down) for n in (size.header, size.positions, size.values)]
        return ",".join(map(str, [round, self.client, *sizes, self.first, self.dense, f"{self.seconds:.6g}"])) + "\n"


class Traffic(RoundLines):
    """traffic.csv: bytes that each client of each round sent and received, by header, positions and values.

    Args:
        path: of the file; None writes nothing, as in all but the first of several processes.

    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(COLUMNS, path)

    def write(self, round: int, entries: Sequence[Entry]) -> None:
        """Append the lines of a closed round."""
        self.append(entry.line(round) for entry in entries)


@dataclass
class Ledger:
    """Sums of bytes, steps and time of a run.

    Attributes:
        bytes_up: sent by clients in training rounds.
        bytes_down: received by clients in training rounds.
        bytes_dense: the uplink if every message carried every coordinate.
        bytes_setup_up: sent by clients for head, calibration and exploration.
        bytes_setup_down: first model, mask, and messages to clients for head, calibration and exploration.
        has_model: clients that hold the first model.
        has_mask: clients that hold the mask.
        link_seconds: time of the rounds on the link, each as long as its slowest client.
        client_steps: local steps of all clients; gradients for head and calibration count as steps.
        round_steps: local steps of the rounds only.
        clipped_steps: round steps whose gradient was clipped.
        link: the link; None for no time.
        entries: of the open round.

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
        """Bytes of all messages."""
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
        """Count the messages of so many clients in the preparation, of ``up`` and ``down`` bytes each."""
        self.bytes_setup_up += clients * up
        self.bytes_setup_down += clients * down

    def stepped(self, steps: int, clipped: int) -> None:
        """Count local steps of a round, and the clipped ones among them."""
        self.client_steps += steps
        self.round_steps += steps
        self.clipped_steps += clipped

    def trained(self, client: int, up: Size, down: Size, dense: int, first: int = 0, prepares: bool = False) -> None:
        """Count the messages of one client in a round.

        Args:
            client: its id.
            up: bytes sent.
            down: bytes received, without a first model.
            dense: bytes of the uplink with every coordinate.
            first: bytes of the first model and the mask.
            prepares: whether the round is an exploration, which counts as preparation.

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
        """Close a round: its entries, sorted by client."""
        entries, self.entries = sorted(self.entries, key=lambda entry: entry.client), []
        self.link_seconds += max((entry.seconds for entry in entries), default=0.0)
        return entries

    def figures(self) -> dict[str, int]:
        """Byte figures by name."""
        names = ("bytes_up", "bytes_down", "bytes_dense", "bytes_setup_up", "bytes_setup_down", "bytes_total")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Sums as plain values; there are no entries, as checkpoints are written between rounds."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSTORED}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the sums of a checkpoint; earlier versions stored fewer."""
        self.bytes_up, self.bytes_down, self.bytes_dense = (state[f"bytes_{what}"] for what in ("up", "down", "dense"))
        self.bytes_setup_up, self.bytes_setup_down = state["bytes_setup_up"], state["bytes_setup_down"]
        self.has_model, self.has_mask = set(state["has_model"]), set(state["has_mask"])
        self.link_seconds, self.client_steps = state.get("link_seconds", 0.0), state.get("client_steps", 0)
        self.round_steps, self.clipped_steps = state.get("round_steps", 0), state.get("clipped_steps", 0)
