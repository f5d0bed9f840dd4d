"""Rounds in pairs: one of a runner, one of the hand-written loop, in the same process."""

from __future__ import annotations

import sys
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


@dataclass(frozen=True)
class Spent:
    """What some work took.

    Attributes:
        seconds: on the clock.
        cpu: seconds of this process's threads, together.
        faults: pages that were mapped, mostly of memory that had been given back to the system.

    """

    seconds: float
    cpu: float
    faults: int

    @classmethod
    def now(cls) -> Spent:
        """Read the clocks and counters of this process."""
        return cls(time.perf_counter(), time.process_time(), faults())

    def since(self, before: Spent) -> Spent:
        """Subtract what was spent before."""
        return Spent(self.seconds - before.seconds, self.cpu - before.cpu, self.faults - before.faults)


def faults() -> int:
    """Count the page faults of this process that needed no disk (``ru_minflt``); 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclass
class Times:
    """What the rounds that count have taken of a runner and of the hand-written loop."""

    of_runner: list[Spent] = field(default_factory=list)
    of_hand: list[Spent] = field(default_factory=list)

    @property
    def runner(self) -> list[float]:
        """Seconds of the runner's rounds."""
        return [spent.seconds for spent in self.of_runner]

    @property
    def hand(self) -> list[float]:
        """Seconds of the loop's rounds."""
        return [spent.seconds for spent in self.of_hand]


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
        self.resumed = Spent.now()

    def tick(self) -> None:
        """Time the runner's round from tick to tick, then the hand-written one of the same batches."""
        runner = Spent.now().since(self.resumed)
        if self.round >= 0:
            self._close(runner)
        super().tick()
        self.resumed = Spent.now()

    def _close(self, runner: Spent) -> None:
        began = Spent.now()
        self.hand(self.batches)
        if self.round in self.count:
            self.times.of_runner.append(runner)
            self.times.of_hand.append(Spent.now().since(began))

    def finish(self, rounds: int) -> None:
        """Let the loop catch up with the last round, if no tick closed it."""
        if self.round == rounds - 1:
            self.hand(self.batches)


class Train(Protocol):
    """A runner: trains for ``task.rounds`` rounds and calls ``feed.tick()`` when each begins."""

    def __call__(self, task: Task, feed: Feed) -> Trained:
        """Train from ``task.net()`` on ``feed.batches``."""
        ...
