"""Rounds in pairs: one of a runner, one of the hand-written loop, in the same process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedsparse.bench.problems import Batches, Task


@dataclass(frozen=True)
class Trained:
    """What a runner ends with.

    Attributes:
        weights: the global model (P,) in the order of the network's parameters, or None where it cannot be had.
        bytes_up: what the clients of one round serialise to send, or None if nothing is serialised.
        elsewhere: peak memory in bytes of processes that the runner started.

    """

    weights: Tensor | None
    bytes_up: int | None = None
    elsewhere: int = 0


class Feed:
    """Hands a runner the batches of each round, gathered before its time counts.

    fedsparse, and Flower in its workers, gather theirs themselves, within their time.

    Args:
        batches_of: gathers those of a round.
        options: the fastest options of ``torch.optim.SGD`` for this model.

    """

    def __init__(self, batches_of: Callable[[int], Batches], options: dict[str, bool]) -> None:
        self.batches_of, self.options = batches_of, options
        self.round = -1
        self.batches: Batches = []

    def tick(self) -> None:
        """A round begins; the runner calls this at the same point of every round, and may do so after the last."""
        self.round += 1
        self.batches = self.batches_of(self.round)


@dataclass
class Times:
    """Seconds of the rounds that count."""

    runner: list[float] = field(default_factory=list)
    hand: list[float] = field(default_factory=list)


class Clock(Feed):
    """Closes the pair of the round before whenever a round begins; the other's time counts for nobody else.

    Args:
        batches_of: gathers the batches of a round.
        options: the fastest options of ``torch.optim.SGD`` for this model.
        hand: a round of the hand-written loop.
        count: the rounds that count, without those that warm up.

    """

    def __init__(
        self,
        batches_of: Callable[[int], Batches],
        options: dict[str, bool],
        hand: Callable[[Batches], None],
        count: range,
    ) -> None:
        super().__init__(batches_of, options)
        self.hand, self.count, self.times = hand, count, Times()
        self.resumed = 0.0

    def tick(self) -> None:
        """Time the runner's round from tick to tick, then the hand-written one of the same batches."""
        now = time.perf_counter()
        if self.round >= 0:
            self._close(now - self.resumed)
        super().tick()
        self.resumed = time.perf_counter()

    def _close(self, runner: float) -> None:
        began = time.perf_counter()
        self.hand(self.batches)
        if self.round in self.count:
            self.times.runner.append(runner)
            self.times.hand.append(time.perf_counter() - began)

    def finish(self, rounds: int) -> None:
        """Let the loop catch up with the last round, if no tick closed it."""
        if self.round == rounds - 1:
            self.hand(self.batches)


class Train(Protocol):
    """A runner: trains for ``task.rounds`` rounds and calls ``feed.tick()`` when each begins."""

    def __call__(self, task: Task, feed: Feed) -> Trained:
        """Train from ``task.net()`` on ``feed.batches``."""
        ...
