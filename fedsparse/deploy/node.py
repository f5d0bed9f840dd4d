"""The kept node: one process that stays, so that no message pays for a new process, its imports and its data.

A SuperNode of Flower starts a process for each message and asks for messages every 3 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fedsparse.deploy.place import Place
from fedsparse.deploy.records import unpack

if TYPE_CHECKING:
    from flwr.app import Message

    from fedsparse.deploy.worker import Worker

SHORTEST, LONGEST = 0.05, 1.0  # seconds that a node sleeps between two questions for messages
SHARE = 0.05  # it sleeps for this part of the time since the last message,
TIMES = 4  # and so many times as long as the last question took, or questions in vain would delay answers


class Connected(Protocol):
    """What a node needs of its connection; see ``fedsparse.deploy.internals.Connection``."""

    def receive(self) -> Message | None:
        """Ask for one message."""

    def answer(self, message: Message, answer: tuple[str, bytes], seconds: float) -> None:
        """Answer a message by description and payload, which took so long to make."""

    def fail(self, message: Message, error: Exception, seconds: float) -> None:
        """Answer a message by an error."""

    def runs(self, run: int) -> bool:
        """Whether a run still goes on."""


def pause(idle: float, took: float) -> float:
    """Seconds to sleep until the next question for messages.

    Args:
        idle: seconds without a message.
        took: seconds that the last question took, which is longer when the SuperLink has much to do.

    """
    return min(max(SHARE * idle, TIMES * took, SHORTEST), LONGEST)


def keep(connection: Connected, place: Place, sleep: Callable[[float], None] = time.sleep) -> None:
    """Answer messages, one after the other, until a signal ends the process.

    A worker is made for each run and kept while the run goes on. After an error it is made anew from the node's folder,
    as a SuperNode of Flower does for each message.

    Args:
        connection: to the SuperLink.
        place: where the node works.
        sleep: function that waits.

    """
    workers: dict[int, Worker] = {}
    last = time.monotonic()
    while True:
        asked = time.monotonic()
        message = connection.receive()
        start = time.monotonic()
        if message is None:
            sleep(pause(start - last, start - asked))
            continue
        run = message.metadata.run_id
        if run not in workers:
            workers = {other: worker for other, worker in workers.items() if connection.runs(other)}
        try:
            worker = workers.pop(run, None) or place.worker()
            answer = worker.answer(*unpack(message))
        except Exception as error:
            last = time.monotonic()
            connection.fail(message, error, last - start)
        else:
            workers[run], last = worker, time.monotonic()
            connection.answer(message, answer, last - start)
