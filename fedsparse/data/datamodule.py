"""The data of a federation as a LightningDataModule: one tensor on the device, gathered by index, or a stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import lightning
import numpy as np
import torch
from torch import Tensor

from fedsparse.core import parallel
from fedsparse.core.seeding import Purpose, generator
from fedsparse.data.augment import Augment
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.phased import Plan
from fedsparse.data.rounds import PADDING, Bundle, Cohort
from fedsparse.data.stream import CohortStream, gathered

BUNDLE = 0.05  # seconds: a hundred times what Lightning takes for a batch


class CohortLoader:
    """The cohorts of one round in bundles, sized, as a list that Lightning may iterate again.

    Args:
        cohorts: of the round.
        size: of a bundle; the last may have fewer.

    """

    def __init__(self, cohorts: Sequence[Cohort], size: int = 1) -> None:
        self.bundles = [Bundle(tuple(cohorts[first : first + size])) for first in range(0, len(cohorts), size)]

    def __len__(self) -> int:
        """Number of bundles."""
        return len(self.bundles)

    def __iter__(self) -> Iterator[Bundle]:
        """Yield the bundles in order."""
        return iter(self.bundles)


class StreamLoader:
    """The cohorts of one round from a stream, each a bundle; an unused iterator gathers nothing."""

    def __init__(self, stream: CohortStream, round: int) -> None:
        self.stream, self.number = stream, round

    def __len__(self) -> int:
        """Number of cohorts."""
        return self.stream.plan.number_of_cohorts(self.number)

    def __iter__(self) -> Iterator[Bundle]:
        """Yield the cohorts in order, with their samples."""
        return (Bundle((cohort,)) for cohort in self.stream.round(self.number))


class SplitLoader:
    """A whole split in fixed batches, unshuffled; samples on the disk are gathered by ``workers`` processes.

    Batches are copies, so that a network or loss that writes to its inputs does not change the data.

    Of n processes each has every n-th batch, and at least one, since Lightning skips a loop without batches.

    Attributes:
        total: number of batches of all processes.

    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        workers: int = 0,
        pin: bool = False,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.split, self.batch_size, self.workers, self.pin = split, batch_size, workers, pin
        self.total = -(-len(split.y) // batch_size)
        self.own = range(process, self.total, processes) or range(1)

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self.own)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) batches."""
        y = self.split.y.split(self.batch_size)
        return zip(self._images(), (y[batch].clone() for batch in self.own), strict=True)

    def _images(self) -> Iterable[Tensor]:
        x = self.split.x
        if isinstance(x, Tensor):
            batches = x.split(self.batch_size)
            return (batches[batch].clone() for batch in self.own)
        ends = range(self.batch_size, len(x), self.batch_size)
        indices = np.split(np.arange(len(x)), ends)
        return gathered(x, [indices[i] for i in self.own], self.workers if len(self.own) > 1 else 0, self.pin)


class FederatedDataModule(lightning.LightningDataModule):
    """Clients' data, on the device or streamed to it; ``train_dataloader`` gives the cohorts of the current round.

    Args:
        dataset: train, validation and test split.
        plan: the cohorts of every round.
        tests: for every client the indices of its part of the test split.
        eval_batch_size: samples of an evaluation batch.
        augment: augments training images; None: they are not augmented.
        stream: whether each cohort brings its images to the device; else all lie there. Images on the disk are always
            streamed. It changes no result.
        workers: processes that gather the next cohorts during training; 0: gathered in this process.
        bundle: seconds that a bundle of cohorts trains at least, infinite for all of a round; a stream has bundles of
            one cohort. It changes no result.
        vals: for every client the indices of its part of the validation split; empty where these are not needed.

    Attributes:
        pace: seconds that a cohort takes; infinite until ``paced``.

    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        tests: Sequence[np.ndarray] = (),
        eval_batch_size: int = 512,
        augment: Augment | None = None,
        stream: bool = False,
        workers: int = 0,
        bundle: float = BUNDLE,
        vals: Sequence[np.ndarray] = (),
    ) -> None:
        super().__init__()
        self.bundle, self.pace = bundle, math.inf
        self.dataset, self.plan, self.tests, self.eval_batch_size = dataset, plan, tests, eval_batch_size
        self.augment, self.workers, self.vals = augment, workers, vals
        self.x, self.y = dataset.train.x, dataset.train.y
        self.evaluated: tuple[Split, ...] = (dataset.val, dataset.test)
        self.streams = stream or not isinstance(self.x, Tensor)
        self.stream: CohortStream | None = None

    def state_dict(self) -> dict[str, str]:
        """Fingerprint of the data, for the checkpoint."""
        return {"fingerprint": self.dataset.fingerprint}

    def fetch(self, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Gather and augment the samples of a cohort: x (K, S, B, C, H, W), y (K, S, B)."""
        samples = cohort.samples
        if self.y.device != samples.device:
            self.to(samples.device)
        x, y = cohort.x, self.y[samples]
        if x is None and isinstance(self.x, Tensor):  # this call takes half of an index's time
            x = self.x.index_select(0, samples.view(-1)).view(*samples.shape, *self.x.shape[1:])
        x = self.x[samples] if x is None else x
        return (x if self.augment is None else self._augmented(self.augment, x, cohort)), y

    def _augmented(self, augment: Augment, x: Tensor, cohort: Cohort) -> Tensor:
        """Augment by random numbers keyed by seed, round and client, so that they do not depend on the cohort."""
        shape = (cohort.samples[0].numel(), augment.numbers)
        drawn = [self._uniforms(cohort.round, client, shape) for client in cohort.clients]
        return augment(x.flatten(0, 2), torch.from_numpy(np.concatenate(drawn))).view_as(x)

    def _uniforms(self, round: int, client: int, shape: tuple[int, int]) -> np.ndarray:
        if client == PADDING:
            return np.zeros(shape)
        return generator(self.plan.seed, Purpose.AUGMENT, round, client).random(shape)

    def train_dataloader(self) -> CohortLoader | StreamLoader:
        """Build the cohorts of the trainer's current round, a function of (seed, round)."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        if not self.streams:
            cohorts = self.plan.cohorts(epoch)
            size = len(cohorts) if math.isinf(self.bundle) else max(1, math.ceil(self.bundle / self.pace))
            return CohortLoader(cohorts, size)
        if self.stream is None:
            rounds = self.trainer.max_epochs if self.trainer else -1
            self.stream = CohortStream(self.x, self.plan, None if rounds == -1 else rounds, self.workers, self.pin)
        return StreamLoader(self.stream, epoch)

    def paced(self, seconds: float) -> None:
        """Size the bundles of later rounds by the seconds that a cohort takes: the longest of all processes."""
        self.pace = max(parallel.gather(seconds))

    def val_dataloader(self) -> list[SplitLoader]:
        """Build the loaders of the validation and the test split, in this order."""
        if self.trainer is not None:
            self.to(self.trainer.strategy.root_device)
        place = (self.plan.process, self.plan.processes)
        return [SplitLoader(split, self.eval_batch_size, self.workers, self.pin, *place) for split in self.evaluated]

    @property
    def pin(self) -> bool:
        """Whether batches are pinned: the trainer's device is a GPU."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def teardown(self, stage: str) -> None:
        """End the workers."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def on_exception(self, exception: BaseException) -> None:
        """End the workers of a run that failed."""
        self.teardown("fit")

    def to(self, device: torch.device | str) -> FederatedDataModule:
        """Move the data to a device; of a stream, the labels of the training split."""
        self.y = self.y.to(device)
        if isinstance(self.x, Tensor) and not self.streams:
            self.x = self.x.to(device)
            self.evaluated = tuple(_placed(split, device) for split in self.evaluated)
        return self


def _placed(split: Split, device: torch.device | str) -> Split:
    """Move samples and labels; samples on the disk stay there."""
    return replace(split, x=split.x.to(device), y=split.y.to(device)) if isinstance(split.x, Tensor) else split
