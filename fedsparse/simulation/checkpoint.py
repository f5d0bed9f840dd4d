"""Checkpoints that survive a kill at any moment, and the choice of the one to resume from."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fedsparse.core import files
from fedsparse.core.folder import LAST, PREVIOUS
from fedsparse.core.space import ParamSpace


def _never(round: int) -> bool:
    return False


def _nothing() -> None:
    pass


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk and renames; the last checkpoint but one is kept.

    Lightning's own writes through the folder for temporary files, and copies when that is another file system: a kill
    in the copy leaves a torn file under the checkpoint's name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the file under ``path`` is whole at every moment."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        keep = target.with_name(PREVIOUS) if target.name == LAST else None
        files.write(target, lambda file: torch.save(checkpoint, file), keep)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Load without unpickling objects, and to the CPU: a GPU's checkpoint goes on without one too."""
        return renewed(torch.load(path, map_location="cpu", weights_only=True))


def renewed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint of an earlier version as today's: there the server's optimizer was one of Lightning's."""
    rounds = checkpoint.get("callbacks", {}).get("FederatedRounds")
    if rounds is None or "server" in rounds:
        return checkpoint
    server = {"optimizer": checkpoint["optimizer_states"][1], "rows": torch.zeros(0)}
    kept = {**rounds, "server": server, "downlink": [rounds["downlink"]]}
    return {**checkpoint, "optimizer_states": [], "callbacks": {**checkpoint["callbacks"], "FederatedRounds": kept}}


class RoundCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose folder may have been moved between a kill and the resume.

    Args:
        explores: whether clients explore in a round: what is there before the mask is chosen is no result, and never
            best.
        on_saved: called after each checkpoint that is complete on the disk.
        options: of ModelCheckpoint.

    """

    def __init__(
        self, explores: Callable[[int], bool] = _never, on_saved: Callable[[], None] = _nothing, **options: Any
    ) -> None:
        super().__init__(**options)
        self.explores, self.on_saved = explores, on_saved

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save; a round that was not evaluated has no score to compare, and Lightning would take an old one."""
        evaluated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        if self.monitor is None or (evaluated and not self.explores(trainer.current_epoch)):
            super().on_train_epoch_end(trainer, pl_module)
        if self._last_global_step_saved == trainer.global_step:
            self.on_saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state with all its paths moved to today's folder."""
        here = str(self.dirpath)
        moved = {key: _move(value, here) if "path" in key else value for key, value in state_dict.items()}
        found = {_move(path, here): score for path, score in state_dict["best_k_models"].items()}
        best = {path: score for path, score in found.items() if path}
        super().load_state_dict(moved | {"dirpath": here, "best_k_models": best})


def _move(path: str, folder: str) -> str:
    """Find a checkpoint in another folder; whatever else is named there would be removed for a better one."""
    name = os.path.basename(path)
    return os.path.join(folder, name) if name.endswith(".ckpt") else ""


def read_checkpoint(path: Path, space: ParamSpace, prefix: str = "net.") -> dict[str, Any]:
    """Load and check a checkpoint.

    Args:
        path: the file.
        space: the space of the run's model.
        prefix: before the model's own names in the checkpoint.

    Raises:
        ValueError: the file is damaged, or of another model (names the tensors that differ).

    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"the part {broken} fails its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except Exception as error:
        raise ValueError(f"the checkpoint {path} is damaged ({str(error).splitlines()[0]})") from error
    different = [
        name
        for name, shape in zip(space.names, space.shapes, strict=True)
        if prefix + name not in state or state[prefix + name].shape != shape
    ]
    if different:
        raise ValueError(f"the checkpoint {path} is of another model: {', '.join(different[:4])} differ")
    return checkpoint


def choose_checkpoint(folder: Path, space: ParamSpace) -> tuple[Path | None, list[str]]:
    """Choose the newest whole checkpoint of a run folder, and say what was passed over.

    Returns:
        Its path, or None if the run never closed a round; and one line for each file that could not be used.

    Raises:
        ValueError: there are checkpoints, but none can be used.

    """
    complaints: list[str] = []
    found = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    for path in found:
        try:
            read_checkpoint(path, space)
        except ValueError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    if found:
        raise ValueError("; ".join(complaints) + "; no whole checkpoint is left to resume from")
    return None, complaints
