"""What loggers get beside the figures: the configuration, and for Weights & Biases mask and best model as artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import WandbLogger

FILES = {"mask": "mask.safetensors", "model": "checkpoints/best.ckpt", "partition": "partition.png"}


def wandb_logger(offline: bool, **options: Any) -> WandbLogger:
    """Build Lightning's WandbLogger, quietly: W&B's own lines would tear the progress bar.

    Args:
        offline: keep the run on this machine until ``wandb sync``.
        options: of ``WandbLogger``, such as project, group, id and save_dir.

    """
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="offline" if offline else "online"))
    return WandbLogger(offline=offline, **options)


class Artifacts(lightning.Callback):
    """Hands configuration and files of the run folder to the loggers.

    Args:
        folder: the run folder.
        config: the resolved configuration.
        density: tells the density of each layer of the mask as it is then.

    """

    def __init__(self, folder: Path, config: Mapping[str, Any], density: Callable[[], Mapping[str, float]]) -> None:
        self.folder, self.config, self.density = folder, dict(config), density
        self.told: dict[str, float] = {}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the configuration and the densities."""
        self._configure(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the files that are there, say how an offline run is synced, and close the W&B run."""
        if dict(self.density()) != self.told:  # the mask was chosen while clients trained
            self._configure(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log(logger)

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: Any) -> None:
        """Close a W&B run that failed, so that the next run of a sweep does not go on in it."""
        import wandb

        if wandb.run is not None:
            wandb.run.finish(exit_code=1)

    def _configure(self, trainer: lightning.Trainer) -> None:
        self.told = dict(self.density())
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config | {"density": self.told})

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
