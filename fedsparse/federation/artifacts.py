"""Mask and best model as artifacts of a Weights & Biases run."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.loggers import WandbLogger

FILES = {"mask": "mask.safetensors", "model-best": "checkpoints/best.ckpt", "partition": "partition.png"}


class Artifacts(lightning.Callback):
    """Hands files of the run folder to W&B when training ends; does nothing for other loggers.

    Args:
        folder: the run folder.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log what is there."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log(logger)

    def _log(self, logger: WandbLogger) -> None:
        import wandb

        for name, file in FILES.items():
            if (self.folder / file).exists():
                artifact = wandb.Artifact(f"{name}-{logger.experiment.id}", type=name.split("-")[0])
                artifact.add_file(str(self.folder / file))
                logger.experiment.log_artifact(artifact)
