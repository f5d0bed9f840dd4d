"""The Trainer of a run, with its callbacks, checkpoints and loggers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.plugins.precision import Precision

from fedsparse.core import files, parallel
from fedsparse.core.folder import BEST, CHECKPOINTS, CLIENTS, LAST, RUN_ID
from fedsparse.core.precisions import DOUBLE, HALF
from fedsparse.federation.phases import Phases
from fedsparse.masks import Mask
from fedsparse.simulation import strategy
from fedsparse.simulation.artifacts import Artifacts, Identity, Table, WandbRows, best_of, send_landscape, started
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.checkpoint import AtomicCheckpointIO, RoundCheckpoint
from fedsparse.simulation.csv_logger import RoundCSV
from fedsparse.simulation.devices import device_of, fabric_of
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.origin import Origin
from fedsparse.simulation.own_models import OwnModels
from fedsparse.simulation.personal import Personal
from fedsparse.simulation.precision import DoublePrecision, HalfPrecision
from fedsparse.simulation.progress import RoundProgress
from fedsparse.simulation.tracking import GracefulStop, RoundLog

Trainer = lightning.Trainer


@dataclass(frozen=True)
class Session:
    """Options of training, checkpoints and logging on this machine.

    Attributes:
        trainer: builds Lightning's Trainer.
        accelerator: name of the Trainer's accelerator.
        precision: ``trainer.precision``.
        deterministic: whether kernels give the same bits whenever a command runs; or ``warn``.
        tf32: whether products of float32 matrices are in TF32 on a GPU.
        max_time: seconds after which the round is closed and saved; None: no limit.
        eval_every: rounds between evaluations.
        checkpoint_every: rounds between checkpoints.
        monitor: the accuracy of validation that chooses the best checkpoint.
        loggers: by name, builders of a logger in a folder.
        callbacks: the user's.
        personal: builds the evaluation of each client; None: there is none.
        config: the configuration as plain values, for loggers.

    """

    trainer: Callable[..., lightning.Trainer]
    accelerator: str
    precision: str
    deterministic: bool | str
    tf32: bool
    max_time: float | None
    eval_every: int
    checkpoint_every: int
    monitor: str
    loggers: Mapping[str, Callable[..., Any]]
    callbacks: Sequence[lightning.Callback]
    personal: Callable[..., Personal] | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run; those that are read after the training have a name."""

    rounds: FederatedRounds
    log: RoundLog
    stop: GracefulStop
    artifacts: Artifacts
    others: list[lightning.Callback]
    personal: Personal | None = None

    def listed(self) -> list[lightning.Callback]:
        """List the callbacks in the order of their calls: ``FederatedRounds`` first, checkpoints last."""
        personal = [] if self.personal is None else [self.personal]
        own = [] if self.log.own is None else [self.log.own]
        watching = [self.log.evaluation, *own, self.log, self.stop, self.artifacts]
        return [self.rounds, *personal, *watching, *self.others]


def build_callbacks(
    session: Session,
    rounds: FederatedRounds,
    evaluation: Evaluation,
    own: OwnModels | None,
    clients: Callable[[int], int],
    phases: Phases,
    mask: Callable[[], Mask],
    folder: Path,
    shared: bool = False,
) -> Callbacks:
    """Build all callbacks.

    Args:
        session: options of the run.
        rounds: runs the rounds.
        evaluation: of the global models.
        own: evaluates the clients' own models; None where nothing stays with the clients.
        clients: counts the clients of a round.
        phases: of the run.
        mask: gives the present mask.
        folder: the run folder.
        shared: whether other runs write to the same terminal at the same time.

    """
    progress = RoundProgress(rounds, evaluation, clients, shared=shared, own=own)
    artifacts = Artifacts(folder, session.config, lambda: mask().by_layer())
    personal = None
    if session.personal is not None:
        personal = session.personal(path=folder / CLIENTS if parallel.process() == 0 else None, rounds=rounds)
    checkpoints = build_checkpoints(folder / CHECKPOINTS, rounds, phases, session)
    log, stop = RoundLog(rounds, evaluation, own, personal), GracefulStop(session.max_time)
    rows = [WandbRows()] if "wandb" in session.loggers else []
    return Callbacks(rounds, log, stop, artifacts, [progress, *rows, *session.callbacks, *checkpoints], personal)


def build_checkpoints(
    folder: Path, rounds: FederatedRounds, phases: Phases, session: Session
) -> list[lightning.Callback]:
    """Build the callbacks of the best checkpoint by validation and the last one; the latter calls ``rounds.saved``."""
    shared: dict[str, Any] = {
        "dirpath": folder,
        "save_top_k": 1,
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    best = RoundCheckpoint(
        phases.explores, **shared, monitor=session.monitor, mode="max", filename=BEST.removesuffix(".ckpt")
    )
    every = session.checkpoint_every
    last = RoundCheckpoint(on_saved=rounds.saved, **shared, filename=Path(LAST).stem, every_n_epochs=every)
    return [best, last]


def build_loggers(chosen: Mapping[str, Callable[..., Any]], folder: Path, identity: Identity, round: int) -> list[Any]:
    """Build the logger of metrics.csv and the chosen ones, without those that cannot be started.

    Args:
        chosen: by name, builders of a logger in a folder.
        folder: the run folder.
        identity: of the run in W&B.
        round: rounds closed so far; rows after it are dropped from metrics.csv.

    """
    table = RoundCSV(folder)
    table.drop_from(round + 1)
    shown = {"identity": identity, "best": best_of(table.rows)}
    options = {"wandb": {**shown, **_run(folder)}} if "wandb" in chosen else {}
    built = [build(save_dir=str(folder), **options.get(name, {})) for name, build in chosen.items()]
    return [table, *(logger for logger in built if started(logger))]


def log_landscape(
    chosen: Mapping[str, Callable[..., Any]],
    folder: Path,
    identity: Identity,
    files: Sequence[Path],
    clients: Callable[[], Table],
) -> None:
    """Add the files of a landscape to the W&B run of a folder, if it has one; a failure is a warning.

    Args:
        chosen: by name, builders of a logger in a folder.
        folder: the run folder.
        identity: of the run in W&B.
        files: pictures and figures.
        clients: gives the table of clients.

    """
    if "wandb" in chosen and (folder / RUN_ID).is_file():
        rows = RoundCSV(folder).rows
        logger = chosen["wandb"](save_dir=str(folder), identity=identity, best=best_of(rows), **_run(folder))
        if started(logger):
            send_landscape(logger, files, folder, rows[-1], clients)


def build_trainer(
    session: Session, callbacks: Callbacks, loggers: list[Any], rounds: int, origin: Origin
) -> lightning.Trainer:
    """Build the Trainer of the whole run, of so many rounds; its checkpoints leave out what is as in ``origin``."""
    plugin = _precision_plugin(session)
    several = {"strategy": strategy.CohortStrategy()} if parallel.joined() else {}
    found = [environment] if (environment := strategy.environment()) else []
    return session.trainer(
        **({} if plugin is None else {"precision": None}),
        **several,
        accelerator=session.accelerator,
        max_epochs=rounds,
        max_time=None,
        check_val_every_n_epoch=session.eval_every,
        callbacks=callbacks.listed(),
        logger=loggers,
        plugins=[AtomicCheckpointIO(origin), *found, *([] if plugin is None else [plugin])],
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )


def as_trained(session: Session) -> AbstractContextManager[None]:
    """Enter the precision in which the Trainer calls a training step."""
    plugin = _precision_plugin(session)
    return fabric_of(session.accelerator, session.precision).autocast() if plugin is None else plugin.forward_context()


def _precision_plugin(session: Session) -> Precision | None:
    """Build the plugin of half or double precision, for which Lightning's does not fit; None for the others."""
    if session.precision == HALF:
        return HalfPrecision(device_of(session.accelerator))
    return DoublePrecision() if session.precision == DOUBLE else None


def _run(folder: Path) -> dict[str, str]:
    """Give W&B the run's id, so that a resume continues the run."""
    return {"id": _run_id(folder), "resume": "allow"}


def _run_id(folder: Path) -> str:
    """Read the run's id for Weights & Biases, drawn once and stored in the folder, for a resume to continue the run."""
    path = folder / RUN_ID
    if not path.exists():
        files.write(path, secrets.token_hex(4))
    return path.read_text().strip()
