"""How long clients train, and how long the exchange and the sum of their updates take."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsparse.bench.gpu.device import sync
from fedsparse.bench.gpu.session import Figures, ms
from fedsparse.core.subspace import Subspace
from fedsparse.federation.client.drift import GradientCorrection, NoCorrection
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.round import Round
from fedsparse.federation.stores.store import Kept
from fedsparse.federation.watcher import Watcher


class Training(NoCorrection):
    """Times each cohort from its start to its update; it corrects no gradient.

    Attributes:
        seconds: of every cohort.
        ended: when the last one was done.

    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.began, self.ended = device, 0.0, 0.0
        self.seconds: list[float] = []

    def start(self, theta: Tensor, clients: Sequence[int], subspace: Subspace) -> GradientCorrection:
        """Begin to time a cohort."""
        sync(self.device)
        self.began = time.perf_counter()
        return End(self)

    def end(self) -> None:
        """End the time of a cohort."""
        sync(self.device)
        self.ended = time.perf_counter()
        self.seconds.append(self.ended - self.began)


class End(GradientCorrection):
    """Ends the time of a cohort when it has trained."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def finish(self, change: Tensor, lr: float, steps: Sequence[float]) -> Kept:
        """Clients store nothing."""
        self.training.end()
        return {}


class Taking(Watcher):
    """Times the exchange and the sum of each cohort.

    Args:
        training: of the same cohorts.

    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.seconds: list[float] = []

    def receive(self, round: Round, trained: Update, received: Update) -> None:
        """End the time of a cohort's exchange and sum."""
        sync(self.training.device)
        self.seconds.append(time.perf_counter() - self.training.ended)


class Parts:
    """The times of both.

    Args:
        device: where clients train.

    """

    def __init__(self, device: torch.device) -> None:
        self.training = Training(device)
        self.taking = Taking(self.training)

    def figures(self) -> Figures:
        """Medians over all cohorts."""
        return {
            "client_training_ms": ms(self.training.seconds),
            "client_exchange_and_sum_ms": ms(self.taking.seconds),
        }
