"""fedsparse as a runner: the federation that ``python -m fedsparse.train`` would build, dense, ``exchange=full``."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import wandb
from rich.console import Console
from torch import nn

from fedsparse import __version__
from fedsparse.bench.compare import in_pairs
from fedsparse.bench.pairs import Feed, Trained
from fedsparse.bench.problems import BARE, BLOCKS, CLIENTS, EVERYTHING, LR, MOMENTUM, UNVALIDATED, Problem, Task
from fedsparse.bench.rows import Row
from fedsparse.core.space import ParamSpace
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.federation.exchange.exchange import Full
from fedsparse.federation.federation import Federation
from fedsparse.federation.server.aggregation import WeightedMean
from fedsparse.federation.server.topology import Flat
from fedsparse.optim.sgdm import SparseSGDM
from fedsparse.simulation.artifacts import wandb_logger
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.checkpoint import AtomicCheckpointIO, RoundCheckpoint
from fedsparse.simulation.csv_logger import RoundCSV
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.progress import RoundProgress
from fedsparse.simulation.tracking import RoundLog


class Ticks(lightning.Callback):
    """Tells a feed when a round begins."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """An epoch is a round."""
        self.feed.tick()


def measure(problem: Problem, setting: str, folder: Path, cohort: int = 1) -> Row:
    """Run fedsparse and the hand-written loop in pairs on one problem.

    Args:
        problem: the model, and how often it is measured.
        setting: one of ``SETTINGS``, or ``BLOCKS``.
        folder: for what the run writes.
        cohort: bound of the clients that train together; the row says how many do.

    """
    size = Task(problem, 1).plan(cohort).cohort_size(CLIENTS)
    figures = in_pairs(partial(train, setting=setting, folder=folder), problem, size)
    return Row(problem.name, "fedsparse", __version__, setting, **figures)


def train(task: Task, feed: Feed, setting: str = BARE, folder: Path = Path()) -> Trained:
    """Run the federation."""
    module, rounds = _federation(task.net(), task.cohort, 8 if setting == BLOCKS else 1)
    data = FederatedDataModule(task.dataset, task.plan(task.cohort))
    _trainer(rounds, Ticks(feed), task.rounds, setting, folder).fit(module, data)
    if wandb.run is not None:
        wandb.run.finish()
    return Trained(rounds.federation.server.rows[0], rounds.federation.ledger.bytes_up // task.rounds)


def _federation(net: nn.Module, cohort: int, block: int) -> tuple[ClientModule, FederatedRounds]:
    """Build clients and protocol."""
    space = ParamSpace.of(net)
    trained = torch.ones(space.size, dtype=torch.bool)
    module = ClientModule(net, space, trained, partial(SparseSGDM, lr=LR, momentum=MOMENTUM), cohort=cohort)
    exchange = Full(trained=trained, local=space.local)
    federate = partial(Federation, exchange=exchange, aggregation=WeightedMean(block=block), topology=Flat())
    return module, FederatedRounds(federate)


def _trainer(federation: FederatedRounds, ticks: Ticks, rounds: int, setting: str, folder: Path) -> lightning.Trainer:
    """Build the trainer: bytes and csv always, the rest if asked for."""
    evaluation, more = Evaluation(), setting in (UNVALIDATED, EVERYTHING)
    callbacks = [federation, evaluation, RoundLog(federation, evaluation), ticks]
    loggers: list[Any] = [RoundCSV(folder)]
    if more:
        callbacks += _beside(federation, evaluation, setting == EVERYTHING, folder)
        loggers.append(wandb_logger(offline=True, project="fedsparse-bench", save_dir=folder))
    return lightning.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        limit_val_batches=None if setting == EVERYTHING else 0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        enable_checkpointing=more,
        default_root_dir=folder,
    )


def _beside(federation: FederatedRounds, evaluation: Evaluation, validated: bool, folder: Path) -> list[Any]:
    """Build progress bar and checkpoints."""
    terminal = Console(file=io.StringIO(), force_terminal=True)
    best = RoundCheckpoint(dirpath=folder, filename="best", monitor="val/acc", mode="max", save_on_train_epoch_end=True)
    last = RoundCheckpoint(dirpath=folder, filename="last", save_on_train_epoch_end=True)
    return [
        RoundProgress(federation, evaluation, lambda round: CLIENTS, terminal),
        *([best] if validated else []),
        last,
    ]
