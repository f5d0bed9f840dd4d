"""Checkpoints: atomic writes, which a kill at any moment cannot damage, and the choice of the one to resume from."""

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
from fedsparse.federation.server.merging import base_of
from fedsparse.simulation.origin import LEFT_OUT, NET, OfAnotherModel, Origin, opened


def _never(round: int) -> bool:
    return False


def _nothing() -> None:
    pass


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the target, flushes it to the disk and renames it; the previous one is kept.

    Lightning writes to the folder for temporary files, and copies if that is another file system: a kill during the
    copy leaves a partial file under the checkpoint's name.

    Args:
        origin: what a written checkpoint need not hold; None: it holds everything, and so must one that is loaded.

    """

    def __init__(self, origin: Origin | None = None) -> None:
        super().__init__()
        self.origin = origin

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the file under ``path`` is complete at every moment."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        keep = target.with_name(PREVIOUS) if target.name == LAST else None
        stored = checkpoint if self.origin is None else self.origin.packed(checkpoint)
        files.write(target, lambda file: torch.save(stored, file), keep)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Load a checkpoint to the CPU, so that a GPU's loads without a GPU, and without unpickling objects."""
        checkpoint = renewed(torch.load(path, map_location="cpu", weights_only=True))
        if self.origin is None:
            if LEFT_OUT in checkpoint:
                raise ValueError(f"{path} holds only what has changed; load it by fedsparse.weights(<run folder>)")
            return checkpoint
        return self.origin.whole(opened(checkpoint, self.origin.space))


def renewed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of an earlier version.

    Lightning stored the server's optimizer, and later the weights that adapters were merged into, with the network's.
    """
    rounds = checkpoint.get("callbacks", {}).get("FederatedRounds")
    if rounds is None:
        return checkpoint
    kept = dict(rounds)
    if "server" not in rounds:
        server = {"optimizer": checkpoint["optimizer_states"][1], "rows": torch.zeros(0)}
        kept |= {"server": server, "downlink": [rounds["downlink"]]}
        checkpoint = {**checkpoint, "optimizer_states": []}
    if (merging := rounds.get("merging")) is not None and "layers" not in merging:
        ends = NET, base_of("")
        names = [name for name in checkpoint["state_dict"] if name.startswith(ends[0]) and name.endswith(ends[1])]
        layers = {name[len(ends[0]) : -len(ends[1])]: {"weight": checkpoint["state_dict"][name]} for name in names}
        kept["merging"] = {**merging, "layers": layers}
    return {**checkpoint, "callbacks": {**checkpoint["callbacks"], "FederatedRounds": kept}}


class RoundCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose folder may be moved before a resume.

    Args:
        explores: whether a round is an exploration: the model before the mask is chosen is never the best one.
        on_saved: called after each checkpoint that is complete on the disk.
        options: of ModelCheckpoint.

    """

    def __init__(
        self, explores: Callable[[int], bool] = _never, on_saved: Callable[[], None] = _nothing, **options: Any
    ) -> None:
        super().__init__(**options)
        self.explores, self.on_saved = explores, on_saved

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save, except by score after a round without evaluation: Lightning would compare an old score."""
        evaluated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        if self.monitor is None or (evaluated and not self.explores(trainer.current_epoch)):
            super().on_train_epoch_end(trainer, pl_module)
        if self._last_global_step_saved == trainer.global_step:
            self.on_saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, with all its paths moved to the present folder."""
        here = str(self.dirpath)
        moved = {key: _move(value, here) if "path" in key else value for key, value in state_dict.items()}
        found = {_move(path, here): score for path, score in state_dict["best_k_models"].items()}
        best = {path: score for path, score in found.items() if path}
        super().load_state_dict(moved | {"dirpath": here, "best_k_models": best})


def _move(path: str, folder: str) -> str:
    """Move a checkpoint's path to another folder; other paths become empty, as ModelCheckpoint may delete the file."""
    name = os.path.basename(path)
    return os.path.join(folder, name) if name.endswith(".ckpt") else ""


def read_checkpoint(path: Path, space: ParamSpace) -> dict[str, Any]:
    """Load and check a checkpoint; what it leaves out of the network's state is filled in by ``Origin.whole``.

    Args:
        path: the file.
        space: the space of the run's model.

    Raises:
        ValueError: the file is damaged, or of another model (names the tensors that differ).

    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"the part {broken} fails its checksum")
        return opened(torch.load(path, map_location="cpu", weights_only=True), space)
    except OfAnotherModel as error:
        raise ValueError(f"the checkpoint {path} {error}") from error
    except Exception as error:
        raise ValueError(f"the checkpoint {path} is damaged ({str(error).splitlines()[0]})") from error


def choose_checkpoint(folder: Path, space: ParamSpace) -> tuple[Path | None, list[str]]:
    """Choose the newest valid checkpoint of a run folder.

    Returns:
        Its path, or None without checkpoints; and one line for each newer file that is damaged or of another model.

    Raises:
        ValueError: there are checkpoints, but none is valid.

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
