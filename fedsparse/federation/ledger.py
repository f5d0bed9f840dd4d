"""What crossed the network: lengths of payloads, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


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

    """

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_dense: int = 0
    bytes_setup_up: int = 0
    bytes_setup_down: int = 0
    has_model: set[int] = field(default_factory=set)
    has_mask: set[int] = field(default_factory=set)

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

    def round(self, clients: int, up: int, down: int, dense: int) -> None:
        """Count one message up and one down for so many clients of a training round."""
        self.bytes_up += clients * up
        self.bytes_down += clients * down
        self.bytes_dense += clients * dense

    def figures(self) -> dict[str, int]:
        """All byte figures by name."""
        names = ("bytes_up", "bytes_down", "bytes_dense", "bytes_setup_up", "bytes_setup_down", "bytes_total")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in asdict(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values of a checkpoint."""
        for name, value in state.items():
            setattr(self, name, set(value) if name.startswith("has_") else value)
