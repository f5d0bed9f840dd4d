"""Samples that worker processes gather while others are trained on: the next cohorts, or the next batches."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyle

from fedsparse.core.signals import CLUSTER, TERMINAL
from fedsparse.data.phased import Plan
from fedsparse.data.rounds import Cohort
from fedsparse.data.samples import Samples

SIGNALS = CLUSTER  # what workers heed of their parent alone


class Gather(MapStyle[Tensor | ValueError]):
    """What a worker does. An error is handed over as a value: raised, it would reach the user with a traceback."""

    def __init__(self, x: Tensor | Samples) -> None:
        self.x = x

    def __getitem__(self, index: np.ndarray) -> Tensor | ValueError:
        """Gather: int64 (*) -> (*, ...), or why that cannot be done."""
        try:
            return self.x[torch.from_numpy(index)]
        except ValueError as error:
            return error


def gathered(x: Tensor | Samples, indices: Iterable[np.ndarray], workers: int, pin: bool = False) -> Generator[Tensor]:
    """Gather request after request, in order; nothing happens before the first is asked for.

    Args:
        x: what to gather from, on the CPU.
        indices: the requests, int64 of any shape; drawn as workers become free.
        workers: processes, each of which has at most one request at hand or done; so as many are ahead. 0 gathers in
            this process, when asked. They end when the iterator is closed or gathers the last request.
        pin: whether to put samples into memory that a GPU can copy from while it computes.

    Raises:
        ValueError: what ``x`` raised, in a worker too.

    """
    loader = DataLoader(
        Gather(x),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        worker_init_fn=heed_the_parent_alone,
        pin_memory=pin,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    for samples in loader:
        if isinstance(samples, ValueError):
            raise samples
        yield samples


def heed_the_parent_alone(worker: int) -> None:
    """Let a worker outlive the signals that ask the run to close its round, for which it is still needed.

    What sends them may send them to every process of the run, and a terminal always does. DataLoader itself ends its
    workers by SIGTERM.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [*SIGNALS, *TERMINAL])
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


class CohortStream:
    """The cohorts of all rounds with their samples, gathered in the order in which they train.

    One round runs into the next, so that the first cohort of a round, which may be its only one, is prepared while the
    last round ends and is validated. At most ``workers`` cohorts are ahead.

    Args:
        x: what to gather from.
        plan: the cohorts of every round.
        rounds: how many there will be; None: nobody knows.
        workers: processes that gather; 0 is this one, when asked.
        pin: as in ``gathered``.

    """

    def __init__(self, x: Tensor | Samples, plan: Plan, rounds: int | None, workers: int, pin: bool = False) -> None:
        self.x, self.plan, self.rounds, self.workers, self.pin = x, plan, rounds, workers, pin
        self.at: int | None = None  # the round that would come next
        self._start(0)

    def close(self) -> None:
        """End the workers, whoever else still holds an iterator."""
        self.samples.close()
        self.at = None

    def round(self, number: int) -> Iterator[Cohort]:
        """Hand out the cohorts of a round; nothing is gathered before the first is asked for.

        Lightning makes more iterators than it uses, on resume one of a round that is over.
        """
        if number != self.at:
            self.close()
            self._start(number)
        self.at = None  # in the middle of a round
        left = self.plan.number_of_cohorts(number)
        for x in islice(self.samples, left):
            left -= 1
            self.at = None if left else number + 1
            yield replace(self.waiting.popleft(), x=x)

    def _start(self, number: int) -> None:
        self.waiting: deque[Cohort] = deque()  # requested, and not handed out
        requests = _requests(self.plan, number, self.rounds, self.waiting)
        self.samples = gathered(self.x, requests, self.workers, self.pin)
        self.at = number


def _requests(plan: Plan, first: int, rounds: int | None, waiting: deque[Cohort]) -> Iterator[np.ndarray]:
    """Ask for the samples of cohort after cohort, and note whose they are."""
    for round in count(first) if rounds is None else range(first, rounds):
        for cohort in plan.cohorts(round):
            waiting.append(cohort)
            yield cohort.samples.numpy()
