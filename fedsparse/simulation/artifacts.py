"""Loggers: failures become warnings, the configuration is logged, and W&B gets mask, model and partition."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger, WandbLogger

from fedsparse.core.folder import BEST, CHECKPOINTS, MASK, PARTITION

FILES = {"mask": MASK, "model": f"{CHECKPOINTS}/{BEST}", "partition": PARTITION}
CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")
GIVEN_UP: weakref.WeakSet[Logger] = weakref.WeakSet()  # loggers that have failed, and are not called again
log = logging.getLogger("fedsparse")


def wandb_logger(offline: bool, **options: Any) -> WandbLogger:
    """Build Lightning's WandbLogger without W&B's output, which would break the progress bar.

    Args:
        offline: whether the run stays on this machine until ``wandb sync``.
        options: of ``WandbLogger``, such as project, group, id and save_dir.

    """
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="offline" if offline else "online"))
    return WandbLogger(offline=offline, **options)


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
    """Logs the configuration, the mask's densities and the files of the run folder.

    Args:
        folder: the run folder.
        config: the resolved configuration.
        density: gives the density of each layer of the present mask.

    Attributes:
        logged: the densities that were logged last.

    """

    def __init__(self, folder: Path, config: Mapping[str, Any], density: Callable[[], Mapping[str, float]]) -> None:
        self.folder, self.config, self.density = folder, dict(config), density
        self.logged: dict[str, float] = {}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the configuration and the densities."""
        self._configure(trainer.loggers)

    def close(self, loggers: Sequence[Logger]) -> None:
        """Log the files, print how an offline run is synced, and close the W&B run.

        The run's results are written before, so that a failure here loses none of them.
        """
        if dict(self.density()) != self.logged:  # the mask was chosen while clients trained
            self._configure(loggers)
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                _Forgiving(logger, self._log)(logger)
                _end_failed()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: Any) -> None:
        """Close a W&B run that failed, so that the next run of a sweep does not continue it."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _end_failed()

    def _configure(self, loggers: Sequence[Logger]) -> None:
        self.logged = dict(self.density())
        for logger in loggers:
            logger.log_hyperparams(self.config | {"density": self.logged})

    def _log(self, logger: WandbLogger) -> None:
        import wandb

        run = logger.experiment
        for name, file in FILES.items():
            if (self.folder / file).exists():
                artifact = wandb.Artifact(f"{name}-{run.id}", type=name)
                artifact.add_file(str(self.folder / file))
                run.log_artifact(artifact)
        if run.offline:
            print(f"W&B is offline; to sync this run: wandb sync {run.settings.sync_dir}")
        run.finish()


def send_pictures(logger: WandbLogger, pictures: Mapping[str, Path]) -> None:
    """Log pictures by name, and end the W&B run; a failure is a warning."""
    _Forgiving(logger, _log_pictures)(logger, pictures)
    _end_failed()


def _log_pictures(logger: WandbLogger, pictures: Mapping[str, Path]) -> None:
    import wandb

    run = logger.experiment
    for name, path in pictures.items():
        run.log({name: wandb.Video(str(path)) if path.suffix == ".gif" else wandb.Image(str(path))})
    run.finish()


def _end_failed() -> None:
    """Mark an open W&B run as failed and end it."""
    import wandb

    if wandb.run is not None:
        with suppress(Exception):
            wandb.run.finish(exit_code=1)
