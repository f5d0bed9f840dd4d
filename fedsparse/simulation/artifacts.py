"""Loggers: failures become warnings, the configuration is logged, and W&B gets what the run folder has."""

from __future__ import annotations

import json
import logging
import os
import shlex
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fedsparse.core.folder import (
    ADAPTERS_PICTURE,
    CLUSTERS_PICTURE,
    CURVES,
    MASK,
    MASK_PICTURE,
    PARTITION,
    SUMMARY,
    WEIGHTS,
)
from fedsparse.core.monitor import ACCURACY, PERSONAL_ACCURACY
from fedsparse.core.rows import KEY

PICTURES = {
    "partition": PARTITION,
    "mask": MASK_PICTURE,
    "curves": CURVES,
    "adapters": ADAPTERS_PICTURE,
    "clusters": CLUSTERS_PICTURE,
}
CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")
GIVEN_UP: weakref.WeakSet[Logger] = weakref.WeakSet()  # loggers that have failed, and are not called again
# by argument of wandb.init, the environment variable that counts where the configuration has null
VARIABLES = {"group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE", "name": "WANDB_NAME", "tags": "WANDB_TAGS"}
log = logging.getLogger("fedsparse")

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # columns, and rows of as many cells


@dataclass(frozen=True)
class Identity:
    """What W&B shows of a run where neither the configuration nor W&B's environment variables say it.

    Attributes:
        name: of the run.
        tags: to filter by.
        group: name shared by the runs of a sweep; None outside of one.
        job_type: what the run does.
        options: chosen option of each config group, for the configuration that loggers get.

    """

    name: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None
    job_type: str | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Collect arguments of ``wandb.init``, without those that an environment variable sets."""
        known = {"name": self.name, "tags": list(self.tags), "group": self.group, "job_type": self.job_type}
        return {key: value for key, value in known.items() if value and not os.environ.get(VARIABLES[key])}


class RoundWandbLogger(WandbLogger):
    """Lightning's logger of W&B, with the round as the axis of all figures.

    W&B drops a row whose step is not above the last one. A run that is resumed, or that gets a landscape, has several
    segments, and offline ones do not know of each other: so a step is the round plus the number of segments before.
    A row stays open until the next round begins, so that figures of other callbacks join it.

    Args:
        segment: number of segments before this one.
        log_model: whether the model of the last round becomes an artifact.
        best: by name, the best accuracy of the rounds before.
        options: of ``WandbLogger``.

    """

    def __init__(self, segment: int, log_model: bool, best: Mapping[str, float], **options: Any) -> None:
        super().__init__(**options)
        self.segment, self.keeps_model, self.best = segment, log_model, dict(best)
        self.open = False

    def begin(self) -> None:
        """Make the round the axis of all figures, in the place of Lightning's step."""
        self.experiment.define_metric(KEY)
        self.experiment.define_metric("*", step_metric=KEY)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log figures of a round, with the best validation accuracy so far.

        Args:
            metrics: figures, or images and tables of W&B, by name.
            step: the round.

        """
        better = {name: value for name, value in best_of([metrics]).items() if value > self.best.get(name, -1.0)}
        self.best |= better
        shown = {name: self.best[name] for name in best_of([metrics])}
        place = {} if step is None else {"step": step + self.segment}
        self.experiment.log({**metrics, **shown, **({} if step is None else {KEY: step})}, **place)
        self.open = True

    def flush(self) -> None:
        """Close the open row, so that W&B shows it."""
        if self.open:
            self.experiment.log({}, commit=True)
        self.open = False


def best_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Find the best validation accuracies of rounds, by the name that W&B shows.

    >>> best_of([{"val/acc": 0.5}, {"val/acc": 0.7}, {"train/loss": 1.0}])
    {'val/acc_best': 0.7}
    """
    keys = [key for key in (ACCURACY, PERSONAL_ACCURACY) if any(key in row for row in rows)]
    return {f"{key}_best": max(row[key] for row in rows if key in row) for key in keys}


def wandb_logger(
    offline: bool,
    log_model: bool = False,
    save_dir: str | Path = ".",
    id: str | None = None,
    identity: Identity | None = None,
    best: Mapping[str, float] | None = None,
    **options: Any,
) -> RoundWandbLogger:
    """Build the logger of W&B without W&B's output, which would break the progress bar.

    Args:
        offline: whether the run stays on this machine until ``wandb sync``.
        log_model: whether the model of the last round becomes an artifact, ``model.safetensors``.
        save_dir: folder of the folder ``wandb``.
        id: of the run; segments with the same id in ``save_dir`` come before this one.
        identity: what W&B shows where options are None.
        best: by name, the best accuracy of the rounds before.
        options: of ``WandbLogger``, such as project, entity, group, name, tags, notes and job_type.

    """
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="offline" if offline else "online"))
    given = {key: value for key, value in options.items() if value is not None}
    shown = (identity or Identity()).arguments() | given
    segment = 0 if id is None else len([*Path(save_dir).glob(f"wandb/*run-*-{id}*")])
    return RoundWandbLogger(segment, log_model, best or {}, offline=offline, save_dir=save_dir, id=id, **shown)


def started(logger: Logger) -> bool:
    """Start a logger's experiment, and turn its first later failure into a warning, after which it is not called.

    So a failing logger does not cost the run's results.

    Returns:
        Whether it could be started.

    """
    try:
        getattr(logger, "experiment", None)
    except Exception as error:
        _give_up(logger, error)
        return False
    for name in CALLS:
        setattr(logger, name, _Forgiving(logger, getattr(logger, name)))
    return True


class _Forgiving:
    """A logger's method that never raises, and does nothing after a failure of the logger."""

    def __init__(self, logger: Logger, method: Callable[..., Any]) -> None:
        self.logger, self.method = logger, method

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.logger in GIVEN_UP:
            return
        try:
            self.method(*args, **kwargs)
        except Exception as error:
            _give_up(self.logger, error)


def _give_up(logger: Logger, error: Exception) -> None:
    """Warn that a logger failed, and never call it again."""
    GIVEN_UP.add(logger)
    said = " ".join(str(error).split())
    log.warning(
        "%s is left out from here on, the run goes on (%s: %s)", type(logger).__name__, type(error).__name__, said
    )


class Artifacts(lightning.Callback):
    """Logs the configuration and the mask's densities; W&B gets pictures, summary, clients, mask and model at the end.

    Args:
        folder: the run folder.
        config: the resolved configuration, and the options.
        density: gives the density of each layer of the present mask.

    Attributes:
        logged: the densities that were logged last.

    """

    def __init__(self, folder: Path, config: Mapping[str, Any], density: Callable[[], Mapping[str, float]]) -> None:
        self.folder, self.config, self.density = folder, dict(config), density
        self.logged: dict[str, float] = {}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the configuration and the densities."""
        for logger in _of_wandb(trainer.loggers):
            _Forgiving(logger, logger.begin)()
        self._configure(trainer.loggers)

    def close(
        self,
        loggers: Sequence[Logger],
        closed: int,
        summary: Mapping[str, Any] | None = None,
        clients: Callable[[], Table] | None = None,
    ) -> None:
        """Log what the run folder holds, print how an offline run is synced, and close the W&B run.

        The run's results are written before, so that a failure here loses none of them.

        Args:
            loggers: of the run.
            closed: rounds closed.
            summary: of a finished run, which becomes W&B's summary.
            clients: gives the table of clients of a finished run.

        """
        if dict(self.density()) != self.logged:  # the mask was chosen while clients trained
            self._configure(loggers)
        for logger in _of_wandb(loggers):
            _Forgiving(logger, self._log)(logger, closed, summary or {}, clients)
            _end_failed()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: Any) -> None:
        """Close a W&B run that failed, so that the next run of a sweep does not continue it."""
        for _ in _of_wandb(trainer.loggers):
            _end_failed()

    def _configure(self, loggers: Sequence[Logger]) -> None:
        self.logged = dict(self.density())
        for logger in loggers:
            logger.log_hyperparams(self.config | {"density": self.logged})

    def _log(
        self, logger: RoundWandbLogger, closed: int, summary: Mapping[str, Any], clients: Callable[[], Table] | None
    ) -> None:
        _show(logger, self.folder, closed, summary, clients)
        for name, file in {"mask": MASK, **({"model": WEIGHTS} if logger.keeps_model and summary else {})}.items():
            if (self.folder / file).is_file():
                _send(logger.experiment, name, [self.folder / file])
        _finish(logger.experiment)


class WandbRows(lightning.Callback):
    """Closes W&B's row of a round when the next one begins, so that figures of all callbacks are in it."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the row of the round before."""
        for logger in _of_wandb(trainer.loggers):
            _Forgiving(logger, logger.flush)()


def _of_wandb(loggers: Sequence[Logger]) -> list[RoundWandbLogger]:
    return [logger for logger in loggers if isinstance(logger, RoundWandbLogger)]


def send_landscape(
    logger: RoundWandbLogger,
    files: Sequence[Path],
    folder: Path,
    row: Mapping[str, float],
    clients: Callable[[], Table],
) -> None:
    """Log the pictures of a landscape and an artifact of all its files, and end the W&B run; a failure is a warning.

    Where segments of an offline run are synced, the summary of the last one stays. So the run's results are in it too.

    Args:
        logger: of the run.
        files: pictures and figures.
        folder: the run folder.
        row: figures of the last round, and ``round``.
        clients: gives the table of clients.

    """

    def send() -> None:
        import wandb

        kinds = {".gif": wandb.Video, ".png": wandb.Image}
        named = {f"landscape/{path.stem}": (kinds[path.suffix], str(path)) for path in files if path.suffix in kinds}
        logger.begin()
        pictures = {name: kind(path) for name, (kind, path) in named.items()}
        logger.log_metrics({**row, **pictures}, step=int(row[KEY]))
        _show(logger, folder, int(row[KEY]), json.loads((folder / SUMMARY).read_text(encoding="utf-8")), clients)
        _send(logger.experiment, "landscape", files)
        _finish(logger.experiment)

    _Forgiving(logger, send)()
    _end_failed()


def _show(
    logger: RoundWandbLogger, folder: Path, closed: int, summary: Mapping[str, Any], clients: Callable[[], Table] | None
) -> None:
    """Log pictures and the table in the last round's row, then the summary, whose figures replace the row's."""
    import wandb

    files = {f"pictures/{name}": folder / file for name, file in PICTURES.items()}
    shown: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in files.items() if path.is_file()}
    if clients is not None:
        columns, rows = clients()
        shown["clients"] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    if shown:
        logger.log_metrics(shown, step=closed)
    logger.flush()
    logger.experiment.summary.update(dict(summary))


def _send(run: Any, name: str, files: Sequence[Path]) -> None:
    """Log files as an artifact of a run."""
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type=name)
    for path in files:
        artifact.add_file(str(path))
    run.log_artifact(artifact)


def _finish(run: Any) -> None:
    """End a run, and print how an offline one is synced, with its earlier segments."""
    if run.offline:
        here = Path(run.settings.sync_dir)
        segments = [*here.parent.glob(f"offline-run-*-{run.id}*")]
        what = (
            shlex.quote(str(here)) if len(segments) < 2 else f"{shlex.quote(str(here.parent))}/offline-run-*-{run.id}*"
        )
        print(f"W&B is offline; to sync this run: wandb sync {what}")
    run.finish()


def _end_failed() -> None:
    """Mark an open W&B run as failed and end it."""
    import wandb

    if wandb.run is not None:
        with suppress(Exception):
            wandb.run.finish(exit_code=1)
