"""Gathers samples of the next cohorts or batches in worker processes, during training on the present ones."""

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

SIGNALS = CLUSTER  # workers obey these only from their parent


class Gather(MapStyle[Tensor | ValueError]):
    """The data set of a worker, which returns an error as a value; raised, it would come with a traceback."""

    def __init__(self, x: Tensor | Samples) -> None:
        self.x = x

    def __getitem__(self, index: np.ndarray) -> Tensor | ValueError:
        """Gather samples: int64 (*) -> (*, ...), or the error."""
        try:
            return self.x[torch.from_numpy(index)]
        except ValueError as error:
            return error


def gathered(x: Tensor | Samples, indices: Iterable[np.ndarray], workers: int, pin: bool = False) -> Generator[Tensor]:
    """Gather the samples of each request, in order and lazily.

    Args:
        x: the samples, on the CPU.
        indices: the requests, int64 of any shape; read as workers become free.
        workers: processes, each at most one request ahead; they end with the iterator. 0: gathered in this process.
        pin: whether to pin the memory of samples, so that a GPU copies while it computes.

    Raises:
        ValueError: raised by ``x``, also in a worker.

    """
    loader = DataLoader(
        Gather(x),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        worker_init_fn=heed_the_parent_alone,
        pin_memory=pin,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    for samples in loader:
        if isinstance(samples, ValueError):
            raise samples
        yield samples


def heed_the_parent_alone(worker: int) -> None:
    """Block signals that stop a run in a worker, which is needed until the round is closed.

    A terminal, and some schedulers, send them to all processes of a run. A SIGTERM of the parent still ends the worker,
    since DataLoader ends workers by it.
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

    Requests continue over rounds, so that the first cohort of a round is gathered during the end and validation of the
    last one. At most ``workers`` cohorts are ahead.

    Args:
        x: the samples, on the CPU.
        plan: the cohorts of every round.
        rounds: of the run; None: unlimited.
        workers: processes that gather; 0: this one.
        pin: as in ``gathered``.

    """

    def __init__(self, x: Tensor | Samples, plan: Plan, rounds: int | None, workers: int, pin: bool = False) -> None:
        self.x, self.plan, self.rounds, self.workers, self.pin = x, plan, rounds, workers, pin
        self.at: int | None = None  # the next round in order
        self._start(0)

    def close(self) -> None:
        """End the workers, also of iterators in use."""
        self.samples.close()
        self.at = None

    def round(self, number: int) -> Iterator[Cohort]:
        """Iterate over the cohorts of a round; samples are gathered lazily.

        Lightning creates more iterators than it uses, on resume also one of a closed round.
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
        self.waiting: deque[Cohort] = deque()  # requested, not yet returned
        requests = _requests(self.plan, number, self.rounds, self.waiting)
        self.samples = gathered(self.x, requests, self.workers, self.pin)
        self.at = number


def _requests(plan: Plan, first: int, rounds: int | None, waiting: deque[Cohort]) -> Iterator[np.ndarray]:
    """Iterate over the sample indices of all cohorts, and append each cohort to ``waiting``."""
    for round in count(first) if rounds is None else range(first, rounds):
        for cohort in plan.cohorts(round):
            waiting.append(cohort)
            yield cohort.samples.numpy()
