"""The cohorts of a round and the order of their samples, a pure function of (seed, round)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number, check_whole
from fedsparse.core.seeding import Purpose, generator
from fedsparse.core.transfer import on_device

WEIGHTS = ("held", "processed", "equal")  # of a client in an average
PADDING = -1  # the client id of an unused row


@dataclass(frozen=True)
class Cohort:
    """K clients that train together, S local steps of at most B samples each.

    Only ``samples`` and ``x`` move to the device.

    Attributes:
        round: index of the round, from 0.
        clients: K ids; ``PADDING`` marks an unused row.
        samples: int64 (K, S, B), indices of every local step; entries past ``count`` are ignored.
        count: real samples of each step, ``count[step][client]``; 0 is no step.
        weight: K weights in the average.
        x: (K, S, B, C, H, W), the samples, if the loader has gathered them; None if they lie on the device.
        processed: whether weights count processed samples, so that they shrink for a client that stops early.

    """

    round: int
    clients: tuple[int, ...]
    samples: Tensor
    count: tuple[tuple[int, ...], ...]
    weight: tuple[float, ...]
    x: Tensor | None = None
    processed: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Cohort:
        """Move sample indices, and samples if gathered, to a device."""
        samples = on_device(self.samples, torch.device(device))
        if self.x is None:
            return self if samples is self.samples else replace(self, samples=samples)
        # Lightning sets non_blocking for tensors only; pinned samples are copied while the GPU computes
        asynchronous = non_blocking or self.x.is_pinned()
        return replace(self, samples=samples, x=self.x.to(device, non_blocking=asynchronous))

    @property
    def members(self) -> list[tuple[int, int]]:
        """(row, client) of the used rows."""
        return [(row, client) for row, client in enumerate(self.clients) if client != PADDING]


@dataclass(frozen=True)
class Bundle:
    """One batch of the loader: cohorts that train one after the other.

    So what Lightning does for a batch is done once for several cohorts of small networks.

    Attributes:
        cohorts: one or more.

    """

    cohorts: tuple[Cohort, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Bundle:
        """Move the cohorts to a device."""
        return Bundle(tuple(cohort.to(device, non_blocking) for cohort in self.cohorts))


@dataclass(frozen=True)
class LocalWork:
    """Local work of a client in one round.

    Args:
        batch_size: samples of a local step.
        steps: local steps a round; samples are reshuffled after each pass.
        epochs: passes over the client's samples instead; the last batch of each may be short.
        weight: a client's weight in the average: ``held`` samples, ``processed`` samples, or ``equal``.

    Raises:
        ValueError: not exactly one of steps and epochs is given, or one is below 1, or the weight is unknown.

    """

    batch_size: int = 32
    steps: int | None = 4
    epochs: int | None = None
    weight: str = "held"

    def __post_init__(self) -> None:
        """Check the options."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either federation.local_steps or federation.local_epochs, and set the other to null")
        check_whole("data.batch_size", self.batch_size, 1)
        check_number("federation.local_steps", self.steps, whole=True, least=1, null=True)
        check_number("federation.local_epochs", self.epochs, whole=True, least=1, null=True)
        check_choice("federation.weight", self.weight, *WEIGHTS)

    def batches(self, part: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        """Split a client's samples into local steps: indices (S, B) and the number of real samples of each step.

        Args:
            part: the client's sample indices (n,), n >= 1.
            rng: the client's generator of this round.

        """
        if self.steps is not None:
            passes = math.ceil(self.steps * self.batch_size / len(part))
            order = np.concatenate([rng.permutation(part) for _ in range(passes)])[: self.steps * self.batch_size]
            return order.reshape(self.steps, self.batch_size), [self.batch_size] * self.steps
        dealt = [_one_pass(rng.permutation(part), self.batch_size) for _ in range(self.epochs or 0)]
        return np.concatenate([d for d, _ in dealt]), [c for _, counts in dealt for c in counts]

    def count(self, held: int) -> int:
        """Count the local steps of a client with ``held`` samples."""
        return self.steps if self.steps is not None else (self.epochs or 0) * math.ceil(held / self.batch_size)

    def samples(self, held: int) -> int:
        """Count the samples that a client with ``held`` of them trains on, each as often as it is used."""
        return self.steps * self.batch_size if self.steps is not None else (self.epochs or 0) * held

    def least(self, held: int) -> int:
        """Count the samples of the smallest local step of a client with ``held`` samples."""
        return self.batch_size if self.steps is not None else held % self.batch_size or self.batch_size

    def weigh(self, held: int, processed: int) -> float:
        """Compute the weight of a client from its held and processed samples."""
        return float({"held": held, "processed": processed, "equal": 1}[self.weight])


def _one_pass(order: np.ndarray, size: int) -> tuple[np.ndarray, list[int]]:
    """Cut one shuffled pass into steps of ``size``, the last one short and padded with its first sample."""
    steps = math.ceil(len(order) / size)
    padded = np.full(steps * size, order[0])
    padded[: len(order)] = order
    return padded.reshape(steps, size), [min(size, len(order) - s * size) for s in range(steps)]


class RoundPlan:
    """The cohorts of every round.

    Args:
        parts: the sample indices of every client.
        work: local work of a client.
        sample: draws the clients of a round.
        cohort: largest K; the clients of a round are split evenly, so that ten clients at a bound of eight make two
            cohorts of five.
        seed: the run's seed.
        processes: number of processes that share the clients of a round.
        process: index of this process.
        purpose: of the random stream that shuffles samples.
        separate: whether each client has its own cohort, padded to K rows.

    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        work: LocalWork,
        sample: Callable[[int], Sequence[int]],
        cohort: int = 1,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
        purpose: Purpose = Purpose.BATCHES,
        separate: bool = False,
    ) -> None:
        self.parts, self.work, self.sample, self.bound, self.seed = parts, work, sample, cohort, seed
        self.processes, self.process, self.purpose, self.separate = processes, process, purpose, separate

    def bounded(self, cohort: int) -> RoundPlan:
        """Copy the plan with cohorts of at most ``cohort`` clients."""
        return RoundPlan(
            self.parts,
            self.work,
            self.sample,
            cohort,
            self.seed,
            self.processes,
            self.process,
            self.purpose,
            self.separate,
        )

    def cohort_size(self, clients: int) -> int:
        """Compute K for a round of so many clients."""
        share = math.ceil(clients / self.processes)
        return math.ceil(share / math.ceil(share / self.bound))

    def number_of_cohorts(self, round: int, rows: int | None = None) -> int:
        """Count the cohorts of one round, equal for all processes, without drawing samples."""
        size, dealt = self._dealt(round, rows)
        return math.ceil(max(len(clients) for clients in dealt) / (1 if self.separate else size))

    def cohorts(self, round: int, rows: int | None = None) -> list[Cohort]:
        """Build the cohorts of one round that this process trains; some may have no clients.

        Args:
            round: index of the round.
            rows: K; None: ``cohort_size`` of the round's clients.

        """
        size, dealt = self._dealt(round, rows)
        clients, together = dealt[self.process], 1 if self.separate else size
        starts = range(0, self.number_of_cohorts(round, rows) * together, together)
        return [self._cohort(round, clients[start : start + together], size) for start in starts]

    def samples(self, round: int) -> int:
        """Count the samples that the clients of one round train on, in all processes."""
        return sum(self.work.samples(len(self.parts[client])) for client in self.sample(round))

    def cohort_of(self, round: int, client: int) -> Cohort:
        """Build the cohort of one client alone, with the samples it has if it takes part in the round."""
        return self._cohort(round, [client], 1)

    def _dealt(self, round: int, rows: int | None) -> tuple[int, list[list[int]]]:
        """Compute K and the clients of each process."""
        clients = list(self.sample(round))
        loads = [self.work.count(len(self.parts[client])) for client in clients]
        dealt = [[clients[place] for place in places] for places in deal(loads, self.processes)]
        return rows or self.cohort_size(len(clients)), dealt

    def _cohort(self, round: int, clients: Sequence[int], size: int) -> Cohort:
        work = [self.work.batches(self.parts[c], generator(self.seed, self.purpose, round, c)) for c in clients]
        steps = max((len(counts) for _, counts in work), default=1)
        # of unused entries: a sample of the cohort, so that no other one is gathered
        filler = work[0][0].flat[0] if work else 0
        samples = np.full((size, steps, self.work.batch_size), filler, dtype=np.int64)
        count = np.zeros((steps, size), dtype=np.int64)
        for row, (indices, counts) in enumerate(work):
            samples[row, : len(counts)] = indices
            count[: len(counts), row] = counts
        weight = [self.work.weigh(len(self.parts[c]), sum(n)) for c, (_, n) in zip(clients, work, strict=True)]
        padding = size - len(clients)
        return Cohort(
            round=round,
            clients=(*clients, *[PADDING] * padding),
            samples=torch.from_numpy(samples),
            count=tuple(tuple(step) for step in count.tolist()),
            weight=(*weight, *[0.0] * padding),
            processed=self.work.weight == "processed",
        )


def deal(loads: Sequence[int], processes: int) -> list[list[int]]:
    """Assign clients to processes, the longest first, each to the least loaded process (Graham 1969).

    Args:
        loads: local steps of each client.
        processes: their number.

    Returns:
        Indices into ``loads`` for each process: in order for one process, else longest first.

    >>> deal([3, 1, 1, 2], 2)
    [[0, 2], [3, 1]]
    """
    if processes == 1:
        return [list(range(len(loads)))]
    dealt: list[list[int]] = [[] for _ in range(processes)]
    total = [0] * processes
    for place in sorted(range(len(loads)), key=lambda i: -loads[i]):
        least = total.index(min(total))
        dealt[least].append(place)
        total[least] += loads[place]
    return dealt
