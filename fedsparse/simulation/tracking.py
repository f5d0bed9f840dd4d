"""Logging of one row a round, and a clean stop at a signal or a time limit."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import lightning

from fedsparse.core import parallel
from fedsparse.core.signals import CLUSTER, TERMINAL, Stopped, stopped
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.own_models import OwnModels
from fedsparse.simulation.personal import Personal

SIGNALS = CLUSTER  # passed on to the handlers that were set before the training


class RoundLog(lightning.Callback):
    """Logs the figures of each closed round once; the step is the number of closed rounds.

    Args:
        rounds: give loss, learning rate and bytes.
        evaluation: gives the figures of the last evaluation.
        own: gives the figures of the clients' own models; None without.
        personal: gives the figures of each client; None without.

    Attributes:
        row: figures of the last round.
        seconds: of all rounds so far.
        open: whether a round is open.

    """

    def __init__(
        self,
        rounds: FederatedRounds,
        evaluation: Evaluation,
        own: OwnModels | None = None,
        personal: Personal | None = None,
    ) -> None:
        self.rounds, self.evaluation, self.own, self.personal = rounds, evaluation, own, personal
        self.row: dict[str, float] = {}
        self.seconds = 0.0
        self.open = False

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Clear the last evaluation, and start the round's clock."""
        self.evaluation.figures = {}
        self.open, self.began = True, time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the row; nothing if no round is open, as when Lightning calls this again on a resume."""
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
        """Collect the figures of the round: loss, rate, evaluation, watchers; bytes and dropped updates so far."""
        rounds, federation = self.rounds, self.rounds.federation
        training = {"train/loss": rounds.loss, "lr": rounds.lr}
        if len(federation.phases.rounds) > 1:
            training["phase"] = federation.phases.rounds.index(rounds.phase)
        personal = {} if self.personal is None else self.personal.figures
        own = {} if self.own is None else self.own.figures
        counted = federation.ledger.figures() | {
            "client_steps": federation.ledger.client_steps,
            "dropped_updates": len(federation.dropped),
        }
        watched = {name: value for watcher in federation.watchers for name, value in watcher.figures().items()}
        return training | self.evaluation.figures | own | personal | counted | watched

    def state_dict(self) -> dict[str, Any]:
        """Training seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the seconds of a checkpoint."""
        self.seconds = state["seconds"]


class GracefulStop(lightning.Callback):
    """Stops training after SIGTERM, SIGUSR1, SIGUSR2, SIGHUP or Ctrl-C, once the round is closed and saved.

    A cluster sends the first three before it takes a machine away: SLURM the one of ``--signal``, submitit SIGUSR2. A
    second Ctrl-C stops at once. Ignored signals, as under nohup, stay ignored.

    Args:
        limit: seconds after which training stops in the same way; None: no limit.

    Attributes:
        own: the signals that this process got.
        received: those of all processes, as agreed at the end of a round; the caller passes them on with ``hand_on``.
        overtime: whether the limit is reached.

    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = math.inf if limit is None else limit
        self.own: list[signal.Signals] = []
        self.received: list[signal.Signals] = []
        self.overtime = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set the signal handlers, which Lightning resets afterwards; its own would stop within a round."""
        self.began = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in [*CLUSTER, *TERMINAL]:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if number in self.own:
                raise Stopped(number)
            with suppress(OSError):  # not print, which this handler may have interrupted
                os.write(2, b"fedsparse: SIGINT: the round closes and is saved; once more ends at once\n")
        self.own.append(signal.Signals(number))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop after this round, in all processes of a run if one of them got a signal or reached the limit."""
        self._agree()
        if self.received or self.overtime:
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take in what came since the last round ended."""
        self._agree()

    def _agree(self) -> None:
        # a signal that comes while the processes wait for each other stays in own, and counts the next time
        found = parallel.gather(([*self.own], time.monotonic() - self.began >= self.limit))
        self.received = [number for numbers, _ in found for number in numbers]
        self.overtime = any(over for _, over in found)


def hand_on(received: Sequence[signal.Signals]) -> None:
    """Call the present handlers of received signals, such as submitit's, which requeues the job and exits."""
    for number in [number for number in received if number in SIGNALS]:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not stopped:
            handler(number, None)
