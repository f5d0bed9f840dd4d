"""Inputs of the preparation before the first round: network, clients' data, ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.core.seeding import Purpose
from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.images import unchanged
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.preparation.tasks import ClientTask

Losses = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
Sample = Callable[[int, Purpose], Sequence[int]]
Answer = tuple[Tensor, ...]
Gather = Callable[["Preparation", ClientTask, Sequence[int]], Iterable[Answer | None]]
CPU = torch.device("cpu")


def in_process(preparation: Preparation, task: ClientTask, clients: Sequence[int]) -> Iterator[Answer | None]:
    """Run a task for one client after the other, in this process."""
    for client in clients:
        yield task.run(preparation, client)


@dataclass(frozen=True)
class Preparation:
    """The inputs of preparing head and mask.

    Attributes:
        net: the network; only its head changes.
        space: its federated tensors.
        dataset: the splits.
        parts: sample indices of every client.
        sample: draws clients, by round and purpose.
        losses: per-sample losses of a batch (``ClientModule.losses``).
        batch_size: samples of a batch.
        seed: the run's seed.
        ledger: counts bytes and client steps.
        model_length: bytes of the first model.
        inputs: converts samples to the network's inputs.
        device: of the network and its inputs.
        gather: runs a task for clients, and yields what each sends, in their order; None for one that did not answer.

    """

    net: nn.Module
    space: ParamSpace
    dataset: Dataset
    parts: Sequence[np.ndarray]
    sample: Sample
    losses: Losses
    batch_size: int
    seed: int
    ledger: Ledger
    model_length: int
    inputs: Callable[[Tensor], Tensor] = unchanged
    device: torch.device = CPU
    gather: Gather = in_process

    @property
    def eligible(self) -> list[int]:
        """Clients that hold data."""
        return [client for client, part in enumerate(self.parts) if len(part)]

    def take(self, split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gather samples by index: inputs x (n, ...) of the network, labels y (n,). They are not augmented."""
        index = torch.from_numpy(np.asarray(indices))
        return self.inputs(split.x[index].to(self.device)), split.y[index].to(self.device)

    def batches(self, split: Split, indices: np.ndarray, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over batches of samples, at most ``limit``."""
        end = len(indices) if limit is None else min(len(indices), limit * self.batch_size)
        for start in range(0, end, self.batch_size):
            yield self.take(split, indices[start : start + self.batch_size])
