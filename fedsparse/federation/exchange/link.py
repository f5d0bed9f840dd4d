"""The time that messages take on a link: what it would be, computed from their bytes."""

from __future__ import annotations

from dataclasses import dataclass

from fedsparse.core.checks import check_number


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
