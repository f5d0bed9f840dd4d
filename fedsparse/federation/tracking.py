"""One row a round to every logger, and a clean stop on SIGTERM."""

from __future__ import annotations

import signal
import time
from typing import Any

import lightning

from fedsparse.federation.evaluation import Evaluation
from fedsparse.federation.rounds import FederatedRounds


class RoundLog(lightning.Callback):
    """Writes the figures of a closed round once, with x = rounds closed so far.

    Args:
        rounds: whose figures.
        evaluation: the last evaluation.

    """

    def __init__(self, rounds: FederatedRounds, evaluation: Evaluation) -> None:
        self.rounds, self.evaluation = rounds, evaluation
        self.row: dict[str, float] = {}
        self.seconds = 0.0
        self.open = False

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note when the round began."""
        self.evaluation.figures = {}
        self.open, self.began = True, time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the row; Lightning may call this again on resume, without a round: then nothing is written."""
        if not self.open:
            return
        self.open = False
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        self.row = self.figures() | {"seconds": seconds}
        for logger in trainer.loggers:
            logger.log_metrics(self.row, step=trainer.current_epoch + 1)
            logger.save()

    def figures(self) -> dict[str, float]:
        """Figures of the round: loss, learning rate, bytes so far, dropped updates so far, evaluation."""
        rounds = self.rounds
        training = {"train/loss": rounds.loss, "lr": rounds.lr}
        return training | self.evaluation.figures | rounds.ledger.figures() | {"dropped_updates": len(rounds.dropped)}

    def state_dict(self) -> dict[str, Any]:
        """Training seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seconds of a checkpoint."""
        self.seconds = state["seconds"]


class GracefulStop(lightning.Callback):
    """On SIGTERM the round closes, is saved, and training stops; ``asked`` tells the caller to exit with 143."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take SIGTERM over from Lightning, which would stop in the middle of a round; it restores handlers itself."""
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop after this round."""
        if self.asked:
            trainer.should_stop = True
