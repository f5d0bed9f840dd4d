"""apple/pfl-research in its one-process simulation: FederatedAveraging over a SimulatedBackend."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.bench.alone import main
from fedsparse.bench.loop import flat
from fedsparse.bench.pairs import Feed, Trained
from fedsparse.bench.problems import CLIENTS, LR, MOMENTUM, Task


class Learner(nn.Module):
    """A network with the loss that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return F.cross_entropy(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


class UserDataset(Dataset):
    """A client's batches as they are given."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(raw_data=batches[0])
        self.batches = batches

    def __len__(self) -> int:
        """Count samples."""
        return sum(len(y) for _, y in self.batches)

    def iter(self, batch_size: int | None) -> list[tuple[Tensor, Tensor]]:  # the name is pfl's
        """Local steps."""
        return self.batches


class Ticks(TrainingProcessCallback):
    """Tells a feed when a round begins."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The first round begins."""
        self.feed.tick()
        return Metrics()

    def after_central_iteration(self, *arguments: Any, **named: Any) -> tuple[bool, Metrics]:
        """The next round begins."""
        self.feed.tick()
        return False, Metrics()


def train(task: Task, feed: Feed) -> Trained:
    """Run FederatedAveraging; all is in one process and nothing is serialised."""
    learner = Learner(task.net()).train()
    options: dict[str, Any] = {"momentum": MOMENTUM, **feed.options}
    local = partial(torch.optim.SGD, **options)
    model = PyTorchModel(learner, local, torch.optim.SGD(learner.parameters(), lr=1.0))
    data = FederatedDataset(lambda user: UserDataset(feed.batches[user]), itertools.cycle(range(CLIENTS)).__next__)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(task.rounds, 10**9, train_cohort_size=CLIENTS, val_cohort_size=None),
        backend=SimulatedBackend(data, data),
        model=model,
        model_train_params=NNTrainHyperParams(None, 1, LR, local_num_steps=None),
        callbacks=[Ticks(feed)],
        send_metrics_to_platform=False,  # else it prints them every round
    )
    return Trained(flat(list(learner.net.parameters())))


if __name__ == "__main__":
    main(train, sys.argv[1:], version("pfl"))
