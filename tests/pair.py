"""Small federations in several processes, forked from the test's own: no start of Python for each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from pathlib import Path

import torch
from torch import distributed

from fedsparse.core import parallel
from fedsparse.simulation import strategy
from fedsparse.simulation.processes import MEETING, join, leave


def in_processes(work, size, folder):
    """Call ``work(name)`` in so many processes that have met; returns what each returned."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    started = [context.Process(target=_serve, args=(work, rank, size, folder, queue)) for rank in range(size)]
    for process in started:
        process.start()
    found = dict(queue.get() for _ in started)
    for process in started:
        process.join(30)
    failed = [value for value in found.values() if isinstance(value, str)]
    assert not failed, failed[0]
    return [pickle.loads(found[rank]) for rank in range(size)]  # noqa: S301


def _serve(work, rank, size, folder, queue):
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "GROUP_RANK": 0, MEETING: Path(folder) / "meeting"}
    os.environ.update({name: str(value) for name, value in own.items()})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        join()
        queue.put((rank, pickle.dumps(work())))  # the queue itself would share a tensor's memory, which ends here
        distributed.barrier()
    except BaseException:
        queue.put((rank, traceback.format_exc()))
    finally:
        leave()


def fit(small, rounds, folder):
    """Fit a small federation as one of several processes."""
    options = {
        "strategy": strategy.CohortStrategy(),
        "devices": parallel.processes(),
        "plugins": [strategy.environment()],
    }
    return small.fit(rounds, folder, **options)
