"""Requests to clients at their nodes, and the wait for answers; nothing here knows what they are about."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsparse.deploy.messages import Answer, Link, Malformed, Reply, Request
from fedsparse.job.deployed import Options

log = logging.getLogger("fedsparse")
POLL, MOST = 0.02, 0.1  # seconds between two looks for answers: at first, and when nothing has come for long


@dataclass(frozen=True)
class Member:
    """A client that takes part.

    Attributes:
        node: where it is.
        samples: that it declared.

    """

    node: int
    samples: int


@dataclass(frozen=True)
class Errand:
    """What one client is asked for.

    Attributes:
        kind: of the request.
        round: from 0.
        fields: plain values.
        parts: messages by name.

    """

    kind: str
    round: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, bytes] = field(default_factory=dict)


Said = Answer | str  # an answer, or why there is none


class Post:
    """Sends requests of one run, and sorts what arrives.

    Args:
        link: the way to the nodes.
        run: id of the run.
        config: hash of its configuration.
        options: how long to wait, and what to do then.

    Attributes:
        down: bytes of all payloads that were sent.
        up: bytes of all payloads that answered a request.

    """

    def __init__(self, link: Link, run: str, config: str, options: Options) -> None:
        self.link, self.run, self.config, self.options = link, run, config, options
        self.number = secrets.randbits(40)  # so that no answer to a server of before has the number of a request
        self.down = self.up = 0

    def ask(self, errands: Mapping[int, Errand], members: Mapping[int, Member]) -> dict[int, Said]:
        """Ask clients, all at once, and wait for their answers.

        Args:
            errands: by client.
            members: where each is, and how many samples it declared.

        Raises:
            ValueError: a client does not answer in time, and ``deploy.on_missing=stop``.

        """
        pending, said = self._sent(errands, members), dict[int, Said]()
        for reply in self._arriving(pending, said):
            for number, said_by, answer in self._sorted(reply, pending, members):
                del pending[number]
                said[said_by] = answer
        if pending and self.options.on_missing == "stop":
            late = ", ".join(map(str, sorted(pending.values())))
            raise ValueError(f"no answer of client {late} in {self.options.timeout:g} s, and deploy.on_missing=stop")
        why = f"no answer in {self.options.timeout:g} s"
        return said | dict.fromkeys(pending.values(), why)

    def _sent(self, errands: Mapping[int, Errand], members: Mapping[int, Member]) -> dict[int, int]:
        """Send the requests of errands: client by number."""
        pending, messages = dict[int, int](), dict[int, tuple[str, bytes]]()
        for client, errand in errands.items():
            self.number += 1
            pending[self.number] = client
            written = self._request(client, errand).write()
            messages[members[client].node] = written
            self.down += len(written[1])
        self.link.push(messages, max(errand.round for errand in errands.values()))
        return pending

    def _request(self, client: int, errand: Errand) -> Request:
        parts = (errand.kind, client, errand.round, self.config, errand.fields, errand.parts)
        return Request(self.number, self.run, *parts)

    def _arriving(self, pending: Mapping[int, int], said: Mapping[int, Said]) -> Iterator[Reply]:
        """Yield replies until nothing is pending, or time is up."""
        waits = self.options.on_missing == "wait"
        end, pause = time.monotonic() + self.options.timeout, POLL
        while pending and (waits or time.monotonic() < end):
            replies = self.link.pull()
            yield from replies
            pause = POLL if replies else min(MOST, 1.2 * pause)
            if pending and not replies:
                time.sleep(pause)

    def _sorted(
        self, reply: Reply, pending: Mapping[int, int], members: Mapping[int, Member]
    ) -> Iterator[tuple[int, int, Said]]:
        """Yield number, client and answer of a reply that belongs to a pending request; others are logged."""
        asked = {members[client].node: (number, client) for number, client in pending.items()}
        if reply.node not in asked:
            log.info("an answer of node %d is late, doubled, or of another run, and is not counted", reply.node)
            return
        number, client = asked[reply.node]
        said = checked(reply, number, self.run, client, members[client].samples)
        if said is None:
            log.info("client %d: an answer to an earlier request is not counted", client)
            return
        self.up += len(reply.payload)
        yield number, client, said

    def introduce(self, node: int, text: str) -> int:
        """Ask a node who it is: the number of the request."""
        self.number += 1
        self.link.push({node: self._request(0, Errand("join", fields={"text": text})).write()}, 0)
        return self.number


def checked(reply: Reply, number: int, run: str, client: int, samples: int) -> Said | None:
    """Check a reply against its request: the answer, why it does not count, or None if it answers another request."""
    if reply.error is not None:
        return f"it failed: {' '.join(reply.error.split())[:300]}"
    try:
        answer = Answer.read(reply.meta, reply.payload)
    except Malformed as error:
        return f"its answer cannot be read: {error}"
    if answer.run != run or answer.number != number:
        return None
    if answer.client != client:
        return f"its answer is client {answer.client}'s"
    if answer.samples != samples:
        return f"it says that it holds {answer.samples} samples, and declared {samples}"
    return answer
