"""Where the host waits for the device, by what torch calls a synchronizing operation."""

from __future__ import annotations

import collections
import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning
import torch

import fedsparse
from fedsparse.bench.gpu.session import Figures

OWN = (str(Path(fedsparse.__file__).parent) + os.sep, f"{os.sep}transformers{os.sep}")  # whose lines are named


class Waits(lightning.Callback):
    """Counts waits by the line that asked for them, from a round on; on a CPU there are none.

    Args:
        first: the round, from 0; torch prepares its kernels before.

    """

    def __init__(self, first: int) -> None:
        self.first, self.rounds = first, 0
        self.found: collections.Counter[str] = collections.Counter()
        self.listening = ExitStack()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to listen, and count the rounds."""
        if trainer.current_epoch == self.first and pl_module.device.type == "cuda":
            self.listening.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            self.listening.callback(torch.cuda.set_sync_debug_mode, "default")
        self.rounds += trainer.current_epoch >= self.first

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen no longer."""
        self.listening.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Listen no longer, whatever happened."""
        self.listening.close()

    def _note(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        """Count a warning by the two innermost lines that are fedsparse's or transformers'."""
        if "synchroniz" not in str(message):
            return
        frame, places = sys._getframe(1), list[str]()
        while frame is not None and len(places) < 2:
            name = frame.f_code.co_filename
            if any(own in name for own in OWN):
                places.append(f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}:{frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        self.found[" < ".join(places) or f"{'/'.join(Path(filename).parts[-3:])}:{lineno}"] += 1

    def figures(self) -> Figures:
        """Waits a round, in all and by place."""
        n = max(1, self.rounds)
        places = {place: round(count / n, 2) for place, count in self.found.most_common(25)}
        return {"waits_a_round": round(sum(self.found.values()) / n, 2), "by_place": places}
