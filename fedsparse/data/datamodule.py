"""The data of a federation as a LightningDataModule: one tensor on the device, gathered by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning
import numpy as np
import torch
from torch import Tensor

from fedsparse.data.augment import Augment
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.rounds import PADDING, Cohort, RoundPlan
from fedsparse.keys import Purpose, generator


class CohortLoader:
    """The cohorts of one round; sized, and trivial to iterate again, as Lightning does."""

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        self.cohorts = cohorts

    def __len__(self) -> int:
        """Number of cohorts."""
        return len(self.cohorts)

    def __iter__(self) -> Iterator[Cohort]:
        """Yield the cohorts in order."""
        return iter(self.cohorts)


class SplitLoader:
    """A whole split in fixed batches, unshuffled."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.batch_size = split, batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.split.y) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) batches."""
        return zip(self.split.x.split(self.batch_size), self.split.y.split(self.batch_size), strict=True)


class FederatedDataModule(lightning.LightningDataModule):
    """Clients' data on the device; ``train_dataloader`` is this round's cohorts.

    Args:
        dataset: train, validation and test split.
        plan: the cohorts of every round.
        tests: for every client the indices of its part of the test split.
        eval_batch_size: samples of an evaluation batch.
        augment: changes training images at random; None leaves them.

    """

    def __init__(
        self,
        dataset: Dataset,
        plan: RoundPlan,
        tests: Sequence[np.ndarray] = (),
        eval_batch_size: int = 512,
        augment: Augment | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.plan, self.tests, self.eval_batch_size = dataset, plan, tests, eval_batch_size
        self.augment = augment
        self.x, self.y = dataset.train.x, dataset.train.y

    def fetch(self, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Gather, and augment, the samples of a cohort at once: x (K, S, B, C, H, W), y (K, S, B)."""
        samples = cohort.samples
        if self.x.device != samples.device:
            self.x, self.y = self.x.to(samples.device), self.y.to(samples.device)
        x, y = self.x[samples], self.y[samples]
        return (x if self.augment is None else self._augmented(self.augment, x, cohort)), y

    def _augmented(self, augment: Augment, x: Tensor, cohort: Cohort) -> Tensor:
        """Augment by numbers that depend on seed, round and client alone, not on who else is in the cohort."""
        shape = (cohort.samples[0].numel(), augment.numbers)
        drawn = [self._uniforms(cohort.round, client, shape) for client in cohort.clients]
        return augment(x.flatten(0, 2), torch.from_numpy(np.concatenate(drawn))).view_as(x)

    def _uniforms(self, round: int, client: int, shape: tuple[int, int]) -> np.ndarray:
        if client == PADDING:
            return np.zeros(shape)
        return generator(self.plan.seed, Purpose.AUGMENT, round, client).random(shape)

    def train_dataloader(self) -> CohortLoader:
        """Build the cohorts of the trainer's current round, from (seed, round) alone."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return CohortLoader(self.plan.cohorts(epoch))

    def val_dataloader(self) -> list[SplitLoader]:
        """Loaders of the validation and of the test split, in this order."""
        return [SplitLoader(split, self.eval_batch_size) for split in (self.dataset.val, self.dataset.test)]

    def to(self, device: torch.device | str) -> FederatedDataModule:
        """Move the training data to a device."""
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self
