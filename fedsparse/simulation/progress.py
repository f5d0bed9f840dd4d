"""Progress: one bar over the whole run on a terminal, one line a round elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task, TaskID, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from fedsparse.core.monitor import monitor_of
from fedsparse.data.rounds import Bundle
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.own_models import OwnModels

log = logging.getLogger("fedsparse")
NARROWEST, WIDEST = 8, 20  # cells of the bar itself


def human_bytes(count: float) -> str:
    """Format a number of bytes with a unit, in powers of 1,000.

    >>> human_bytes(16_400), human_bytes(8_200_000), human_bytes(999_900_000_000)
    ('16.4 kB', '8.2 MB', '999.9 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class FittedLine(ProgressColumn):
    """The bar's line in the width of the terminal: round, client, loss, accuracy and time left are always there.

    Narrow terminals get them in fewer letters; where there is room, the bar, the bytes and the time so far are added.
    A task has the fields ``wordings``, pairs of place and figures from the longest to the shortest, and ``sent``.

    Args:
        console: gives the width.

    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.remaining, self.elapsed = TimeRemainingColumn(), TimeElapsedColumn()

    def render(self, task: Task) -> RenderableType:
        """Choose what fits."""
        left = f"left {self.remaining.render(task)}"
        cells: list[RenderableType] = []
        room = -1
        for where, figures in task.fields["wordings"]:
            if room < 0:
                cells, room = [where, figures, left], self.console.width - len(f"{where} {figures} {left}")
        bar = NARROWEST if room > NARROWEST else 0
        room -= bar + 1 if bar else 0
        for more in (task.fields["sent"], str(self.elapsed.render(task))):
            if len(more) < room:
                cells.insert(-1, more)
                room -= len(more) + 1
        if bar:
            cells.insert(1, ProgressBar(task.total, task.completed, width=min(WIDEST, bar + room)))
        grid = Table.grid(*(Column(no_wrap=True) for _ in cells), padding=(0, 1))
        grid.add_row(*cells)
        return grid


class RoundProgress(lightning.Callback):
    """Progress bar with round, client, loss, accuracy, bytes and time left.

    Args:
        rounds: gives loss and bytes.
        evaluation: gives the accuracy.
        clients: counts the clients of a round.
        console: for the output; standard error by default.
        shared: whether other runs write there at the same time; rounds are then written to run.log only.
        own: gives the accuracy of own models, which is shown instead where something stays with the clients.

    """

    def __init__(
        self,
        rounds: FederatedRounds,
        evaluation: Evaluation,
        clients: Callable[[int], int],
        console: Console | None = None,
        shared: bool = False,
        own: OwnModels | None = None,
    ) -> None:
        self.rounds, self.evaluation, self.clients, self.own = rounds, evaluation, clients, own
        self.console = console or Console(file=sys.stderr)
        self.bar = self.console.is_terminal and not shared
        self.lines = not self.console.is_terminal and not shared
        self.accuracy = math.nan
        self.began = time.perf_counter()
        self.seen = self.before = self.total = 0
        self.task: TaskID | None = None  # from the start of the training
        self.progress = Progress(
            FittedLine(self.console),
            console=self.console,
            disable=not self.bar,
            refresh_per_second=5,
            redirect_stdout=sys.stdout.isatty(),  # a pipe gets what is printed as ever
        )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar, from the round at which training starts or resumes."""
        total, self.before = self._clients(int(trainer.max_epochs or 0)), self._clients(trainer.current_epoch)
        self.task = self.progress.add_task("", total=total, completed=self.before, wordings=[("round", "")], sent="")
        self.progress.start()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the round's clock and count of clients."""
        self.before, self.seen, self.began = self.before + self.total, 0, time.perf_counter()
        self.total = self.clients(trainer.current_epoch)
        self._show()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Bundle, batch_idx: int
    ) -> None:
        """Advance the bar by the bundle's clients."""
        self.seen += sum(len(cohort.members) for cohort in batch.cohorts)
        self._show()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write a line to run.log, and to the console if it is no terminal."""
        own = {} if self.own is None else self.own.figures
        if self.own is None or own:  # own models are evaluated when the global one is
            figures = self.evaluation.figures | own
            self.accuracy = figures.get(monitor_of(figures), self.accuracy)
        seconds = time.perf_counter() - self.began
        line = f"{self._where()}  {self._figures()}  {self._sent()}  {seconds:.1f} s"
        log.info(line)
        if self.lines:
            print(line, file=self.console.file, flush=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._show()
        self.progress.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the bar, so that the terminal is usable."""
        if self.task is not None:
            self.progress.stop()

    def _clients(self, rounds: int) -> int:
        """Count the clients of so many rounds."""
        return sum(self.clients(round) for round in range(rounds))

    def _where(self) -> str:
        """Name the open or last round; of the phase ``learn`` it is called a round."""
        phase, number = self.rounds.phase, self.rounds.number_in_phase
        return f"{'round' if phase.name == 'learn' else phase.name} {number + 1}/{phase.rounds}"

    def _figures(self) -> str:
        """Format the loss of the last closed round, and the last validation accuracy."""
        loss, accuracy = self.rounds.loss, self.accuracy
        last = f"val acc {accuracy:6.2%}" if accuracy == accuracy else "val acc   -   "
        return f"{f'loss {loss:.3f}' if loss == loss else 'loss  -   '}  {last}"

    def _sent(self) -> str:
        """Format the bytes sent so far: in rounds, or while clients explore in the preparation."""
        ledger = self.rounds.federation.ledger
        if self.rounds.phase.explores:
            return f"sent up {human_bytes(ledger.bytes_setup_up)} in preparation"
        return f"sent up {human_bytes(ledger.bytes_up)}"

    def _show(self) -> None:
        """Write the bar's line, worded from the longest to the shortest."""
        if not self.bar or self.task is None:
            return
        where, count = self._where(), f"client {self.seen:>{len(str(self.total))}}/{self.total}"
        figures = self._figures()
        fewer = figures.replace("  val", "").replace(" %", "%")
        none = fewer.replace("loss ", "").replace("acc ", "")
        wordings = [(f"{where}, {count}", figures), (f"{where} {count}", fewer), (f"{where} {count}", none)]
        done = self.before + self.seen
        self.progress.update(self.task, completed=done, wordings=wordings, sent=self._sent())
