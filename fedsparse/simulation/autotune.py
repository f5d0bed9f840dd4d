"""``federation.cohort=auto``: the number of clients that train stacked.

On a CPU a few sizes are measured for two seconds of CPU time. On a GPU a step of many clients launches as many
kernels as a step of one, so that the largest that fits in memory is taken: it is the same whenever a command runs, and
so are the bits.

Shapes: K clients of a cohort, B samples of a step, P coordinates.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fedsparse.federation.client.drift import GradientCorrection
from fedsparse.federation.client.training import Clients

SECONDS = 2.0
TURNS = 3  # least number of steps of each size, so that one slow step does not decide
MOST = 50  # steps of each size
GAIN = 0.97  # a larger cohort must take less than this share of a smaller one's time, as timings are noisy
ROWS = 3  # values, gradient and change of each client, without the optimizer's moments
SHARE = 0.5  # largest share of the free memory for a cohort

Make = Callable[[int], Clients]
Batch = tuple[Tensor, Tensor]


def choose(seconds: Mapping[int, float]) -> int:
    """Choose the cohort size with the least seconds a client; a larger one only if it is faster than ``GAIN``.

    >>> choose({1: 1.0, 2: 0.8, 4: 0.79})
    2
    """
    best = min(seconds)
    for size in sorted(seconds):
        if seconds[size] < GAIN * seconds[best]:
            best = size
    return best


def sizes(clients: int) -> Iterator[int]:
    """Yield the powers of two below the number of clients of a round, and that number.

    >>> list(sizes(10))
    [1, 2, 4, 8, 10]
    """
    size = 1
    while size < clients:
        yield size
        size *= 2
    yield clients


def largest(make: Make, batch: Batch, clients: int) -> int:
    """Compute the largest cohort that fits in memory: a power of two, or all clients of a round.

    Args:
        make: builds ``Clients`` of a cohort size.
        batch: x (B, ...) and y (B,) of one step.
        clients: of a round.

    """
    room = SHARE * free_memory(batch[0].device)
    fit = int(room) // client_bytes(make(1), batch)
    return clients if fit >= clients else 1 << max(0, fit.bit_length() - 1)


def measure(make: Make, batch: Batch, clients: int, budget: float = SECONDS) -> dict[int, float]:
    """Measure a local step with several cohort sizes on a CPU: median seconds a client, by size.

    The sizes take turns, so that a machine that slows down slows all of them. Seconds are CPU time of this thread, so
    that those of other programs do not count; torch's other threads work beside it.

    A size is left out if it and the smaller ones would not fit in memory, or would exceed the time budget.

    Args:
        make: builds ``Clients`` of a cohort size.
        batch: x (B, ...) and y (B,) of one step.
        clients: of a round, the largest size.
        budget: seconds for all sizes.

    """
    steps: dict[int, Callable[[], None]] = {}
    times: dict[int, list[float]] = {}
    end, room, taken, needed = time.thread_time() + budget, SHARE * free_memory(batch[0].device), 0.0, 0
    for size in sizes(clients):
        expected = size * min((times[known][0] / known for known in times), default=0.0)
        fits = (sum(steps) + size) * needed <= room
        if steps and not (fits and time.thread_time() + (TURNS + 1) * (taken + expected) <= end):
            break
        formed = make(size)
        needed = needed or client_bytes(formed, batch)
        steps[size] = _step(formed, batch, size)
        steps[size]()  # the first is slower
        times[size] = [_seconds(steps[size])]
        taken += times[size][0]
    while len(times[1]) < MOST and time.thread_time() + taken <= end:
        for size, step in steps.items():
            times[size].append(_seconds(step))
    return {size: statistics.median(found) / size for size, found in times.items()}


def _seconds(step: Callable[[], None]) -> float:
    """Measure the CPU time of one step."""
    began = time.thread_time()
    step()
    return time.thread_time() - began


def _step(clients: Clients, batch: Batch, size: int) -> Callable[[], None]:
    """Build a function that takes one local step of so many clients, and waits for the device."""
    x, y = batch if size == 1 else tuple(part.expand(size, *part.shape).contiguous() for part in batch)

    correction = GradientCorrection()

    def step() -> None:
        clients.step(x, y, (len(batch[1]),) * size, correction).tolist()

    return step


def client_bytes(clients: Clients, batch: Batch) -> int:
    """Measure the bytes that a client needs: its rows, and the tensors that a forward saves for the backward."""
    kept: dict[int, int] = {}
    rows = clients.theta.untyped_storage().data_ptr()

    def record(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != rows:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        _step(clients, batch, 1)()
    return (ROWS + len(clients.optimizer.moments)) * clients.theta.nbytes + sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
