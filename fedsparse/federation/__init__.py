"""Clients, server, and the protocol between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = [
    "Clients",
    "Explore",
    "Federation",
    "Phase",
    "Phases",
    "Round",
    "Start",
    "Trajectory",
    "Update",
    "Watcher",
    "play",
]

if TYPE_CHECKING:
    from fedsparse.federation.client.training import Clients
    from fedsparse.federation.exchange.update import Start, Update
    from fedsparse.federation.explore import Explore
    from fedsparse.federation.federation import Federation
    from fedsparse.federation.phases import Phase, Phases
    from fedsparse.federation.round import Round, play
    from fedsparse.federation.trajectory import Trajectory
    from fedsparse.federation.watcher import Watcher
else:  # a name is imported from its module when it is first read
    _HOMES = {
        "Clients": "fedsparse.federation.client.training",
        "Explore": "fedsparse.federation.explore",
        "Federation": "fedsparse.federation.federation",
        "Phase": "fedsparse.federation.phases",
        "Phases": "fedsparse.federation.phases",
        "Round": "fedsparse.federation.round",
        "Start": "fedsparse.federation.exchange.update",
        "Trajectory": "fedsparse.federation.trajectory",
        "Update": "fedsparse.federation.exchange.update",
        "Watcher": "fedsparse.federation.watcher",
        "play": "fedsparse.federation.round",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
