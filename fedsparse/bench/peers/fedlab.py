"""FedLab in its standalone simulation: SGDSerialClientTrainer and SyncServerHandler in one process."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from typing import Any

import torch
from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from torch import Tensor

from fedsparse.bench.alone import main
from fedsparse.bench.pairs import Feed, Trained
from fedsparse.bench.problems import CLIENTS, LR, MOMENTUM, Task


class Trainer(SGDSerialClientTrainer):
    """FedLab's trainer with momentum; an optimizer is made for every client, as in the other runners."""

    def __init__(self, task: Task, feed: Feed) -> None:
        super().__init__(task.net(), CLIENTS)
        self.feed, self.dataset = feed, self
        self.setup_optim(1, task.problem.batch, LR)

    def get_dataloader(self, client: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Local steps of a client."""
        return self.feed.batches[client]

    def train(self, model_parameters: Tensor, train_loader: Any) -> list[Tensor]:
        """One client: a fresh optimizer, then FedLab's loop."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, momentum=MOMENTUM, **self.feed.options)
        return super().train(model_parameters, train_loader)


class Pipeline(StandalonePipeline):
    """FedLab's pipeline, that tells a feed when a round begins."""

    def evaluate(self) -> None:
        """FedLab calls this at the end of a round."""
        self.trainer.feed.tick()


def train(task: Task, feed: Feed) -> Trained:
    """Run the pipeline; all is in one process and nothing is serialised."""
    handler = SyncServerHandler(task.net(), task.rounds, sample_ratio=1.0)
    logging.getLogger().setLevel(logging.WARNING)
    pipeline = Pipeline(handler, Trainer(task, feed))
    feed.tick()
    pipeline.main()
    return Trained(handler.model_parameters)


if __name__ == "__main__":
    main(train, sys.argv[1:], version("fedlab"))
