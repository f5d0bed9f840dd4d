"""Where a node works: its folder, the client that it is, and the settings that are its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from fedsparse.deploy.worker import Worker


@dataclass(frozen=True)
class Place:
    """What a node needs to work.

    Attributes:
        folder: of what the node keeps between rounds.
        client: number of the client.
        own: overrides of the configuration for this node alone, such as ``data.root=/srv/mine``.

    """

    folder: Path
    client: int
    own: tuple[str, ...]

    def worker(self) -> Worker:
        """Make the worker, which imports torch."""
        from fedsparse.deploy.worker import Worker

        return Worker(self.folder, self.client, self.own)

    def for_flower(self) -> str:
        """Write it as a SuperNode's ``--node-config``, whose values can hold neither quotes nor spaces."""
        folder, own = quote(str(self.folder)), quote(json.dumps(self.own))
        return f'partition-id={self.client} folder="{folder}" own="{own}"'

    @classmethod
    def of_flower(cls, config: Mapping[str, Any]) -> Place:
        """Read what ``for_flower`` has written and Flower has parsed."""
        own = json.loads(unquote(str(config["own"])))
        return cls(Path(unquote(str(config["folder"]))), int(config["partition-id"]), tuple(own))
