"""Nodes in this process: each request goes through bytes to a worker, and its answer comes back the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedsparse.deploy.messages import Reply
from fedsparse.deploy.worker import Worker

Tamper = Callable[[Reply], Sequence[Reply]]


class LocalLink:
    """Workers as nodes 100, 101, ...; ``tamper`` turns each reply into what arrives.

    ``kept=False`` builds a worker for each request, as processes that start anew do.
    """

    def __init__(
        self,
        folder: Path,
        clients: int,
        own: Mapping[int, Sequence[str]] | None = None,
        tamper: Tamper = lambda reply: [reply],
        kept: bool = True,
    ) -> None:
        self.tamper, self.kept = tamper, kept
        self.make = {
            100 + client: lambda client=client: Worker(folder / str(client), client, (own or {}).get(client, ()))
            for client in range(clients)
        }
        self.workers = {node: make() for node, make in self.make.items()}
        self.arrived: list[Reply] = []
        self.payloads: list[tuple[str, int, int]] = []  # kind of the request, bytes down and up

    def nodes(self) -> list[int]:
        return list(self.workers)

    def push(self, messages: Mapping[int, tuple[str, bytes]], round: int) -> None:
        for node, (meta, payload) in messages.items():
            worker = self.workers[node] if self.kept else self.make[node]()
            try:
                reply = Reply(node, *worker.answer(meta, payload))
            except Exception as error:
                reply = Reply(node, "", b"", f"{type(error)}:<'{error}'>")
            self.payloads.append((json.loads(meta)["kind"], len(payload), len(reply.payload)))
            self.arrived += self.tamper(reply)

    def pull(self) -> list[Reply]:
        found, self.arrived = self.arrived, []
        return found
