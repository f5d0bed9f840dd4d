"""How long clients train, and how long what follows takes: one callback in front of the protocol, one behind it."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch

from fedsparse.bench.gpu.device import sync
from fedsparse.bench.gpu.federations import ms
from fedsparse.bench.gpu.session import Figures


class Training(lightning.Callback):
    """Times each cohort from what it is sent to its update; stands in front of the protocol.

    Attributes:
        seconds: of every cohort.
        ended: when the last one was done.

    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.began, self.ended = device, 0.0, 0.0
        self.seconds: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        """A batch is a cohort."""
        sync(self.device)
        self.began = time.perf_counter()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """The cohort has trained, and the protocol has not yet seen it."""
        sync(self.device)
        self.ended = time.perf_counter()
        self.seconds.append(self.ended - self.began)


class Taking(lightning.Callback):
    """Times the exchange and the sum of each cohort; stands behind the protocol.

    The last cohort of a round does not count, as the protocol closes the round with it.

    Args:
        training: stands in front.

    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        """The protocol has taken the update in."""
        sync(self.training.device)
        if not trainer.is_last_batch:
            self.seconds.append(time.perf_counter() - self.training.ended)

    def figures(self) -> Figures:
        """Medians over all cohorts."""
        return {
            "client_training_ms": ms(self.training.seconds),
            "client_exchange_and_sum_ms": ms(self.seconds),
        }
