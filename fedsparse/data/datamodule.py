"""The data of a federation as a LightningDataModule: one tensor on the device, gathered by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning
import numpy as np
import torch
from torch import Tensor

from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.rounds import Cohort, RoundPlan


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

    """

    def __init__(
        self, dataset: Dataset, plan: RoundPlan, tests: Sequence[np.ndarray] = (), eval_batch_size: int = 512
    ) -> None:
        super().__init__()
        self.dataset, self.plan, self.tests, self.eval_batch_size = dataset, plan, tests, eval_batch_size
        self.x, self.y = dataset.train.x, dataset.train.y

    def fetch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Gather training samples by index: (*,) -> x (*, C, H, W), y (*,). One gather a cohort."""
        if self.x.device != samples.device:
            self.x, self.y = self.x.to(samples.device), self.y.to(samples.device)
        return self.x[samples], self.y[samples]

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
