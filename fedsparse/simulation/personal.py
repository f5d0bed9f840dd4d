"""Figures of each client, as AutoFLIP reports them: of its local model and the global one, on its test part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from fedsparse.core import parallel
from fedsparse.core.checks import check_choice, check_number
from fedsparse.core.lines import RoundLines
from fedsparse.core.seeding import Purpose, generator
from fedsparse.data.balance import Balance
from fedsparse.data.rounds import PADDING, Bundle
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.figures import (
    AVERAGES,
    GLOBAL,
    GROUPS,
    LOCAL,
    METRICS,
    OTHERS,
    PARTICIPANTS,
    START,
    Row,
    columns,
    metrics_of,
)
from fedsparse.federation.round import Round
from fedsparse.federation.watcher import Watcher
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.copied import Batches, CopiedNet
from fedsparse.simulation.evaluation import mean_loss
from fedsparse.simulation.module import ClientModule


class Personal(lightning.Callback):
    """Evaluates models on the clients' parts of the test split, without affecting the training.

    On a participant's part three models are evaluated: the global model that it received, its model after training, and
    the new global model; on a non-participant's part the two global models. Clients without a test part are left out,
    and so are models that are not finite. This callback comes after ``FederatedRounds``, whose open round it watches.
    Coordinates and buffers that never leave a client are the client's while it trains, and the server's otherwise.

    After a round with an evaluation ``figures`` has the columns of ``federation.figures.columns``.

    Args:
        metrics: some of loss, top1, top5, f1, precision, recall; of sequences loss and top1, exact match, alone.
        average: of the last three over classes: weighted (the original's) | macro | micro.
        every: rounds between evaluations; the last round is always evaluated.
        who: participants, non_participants or both.
        fraction: of the non-participants, in (0, 1]; drawn for each evaluation.
        seed: the run's seed.
        path: of the table of clients; None writes none.
        balance: of the clients' classes, for further columns of that table; None: it has none.
        rounds: the federation's rounds; explorations are not evaluated. None: the network has the one global model.

    Attributes:
        figures: of the last evaluated round.
        due: whether the open round is evaluated.

    Raises:
        ValueError: an invalid option; one line names it.

    """

    def __init__(
        self,
        metrics: Sequence[str] = METRICS,
        average: str = "weighted",
        every: int = 1,
        who: Sequence[str] = GROUPS,
        fraction: float = 1.0,
        seed: int = 0,
        path: Path | None = None,
        rounds: FederatedRounds | None = None,
        balance: Balance | None = None,
    ) -> None:
        _check_some("metrics", metrics, METRICS)
        _check_some("who", who, GROUPS)
        _check(average, every, fraction)
        self.metrics, self.average, self.every = [m for m in METRICS if m in metrics], average, every
        self.who, self.fraction, self.seed, self.rounds, self.balance = who, fraction, seed, rounds, balance
        more = [] if balance is None else balance.columns
        self.table = RoundLines(",".join(["round,client,group,model,n", *self.metrics, *more]), path)
        self.figures: dict[str, float] = {}
        self.due = False

    def on_train_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Copy the network, before its parameters become views into a row."""
        self.copied = CopiedNet(module.net)

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Open the round, and evaluate the global model on the non-participants' test parts."""
        self.figures, self.found = {}, list[Row]()
        last = trainer.current_epoch + 1 == trainer.max_epochs
        explores = self.rounds is not None and self.rounds.phase.explores
        self.due = ((trainer.current_epoch + 1) % self.every == 0 or last) and not explores
        if self.due:
            if PARTICIPANTS in self.who:
                module.watch(Participants(self, trainer, module))
            self.groups = self._groups(trainer.datamodule, trainer.current_epoch)  # type: ignore[attr-defined]
            self._all(trainer, module, {OTHERS: self.groups.get(OTHERS, [])}, START)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, outputs: Any, batch: Bundle, batch_idx: int
    ) -> None:
        """Evaluate the new global model after the last cohort, and write the round's figures."""
        if self.due and trainer.is_last_batch:
            self._all(trainer, module, self.groups, GLOBAL)
            self._close(trainer.current_epoch + 1)

    def participants(self, trainer: Any, module: ClientModule, trained: Update, group: Sequence[int]) -> None:
        """Evaluate the models that K clients have received, and theirs after training, each on its test part.

        Args:
            trainer: of the run.
            module: has just trained the clients.
            trained: their update.
            group: K indices of the global models that they have received.

        """
        clients = module.clients
        for k, client in enumerate(trained.clients):
            if client != PADDING:
                row = clients.theta[k].detach().clone()
                clients.subspace.write(row, trained.start_values[k])
                self.copied.load(module, row, clients.buffers.of(client, group[k]))
                self._evaluate(trainer, module, client, PARTICIPANTS, START)
                self.copied.load(module, clients.theta[k])
                self._evaluate(trainer, module, client, PARTICIPANTS, LOCAL)

    def _all(self, trainer: Any, module: ClientModule, groups: dict[str, list[int]], model: str) -> None:
        """Evaluate the global models on the test parts of all groups' clients, divided among the processes."""
        self.copied.load(module)
        listed = [(client, group) for group, clients in groups.items() for client in clients]
        for client, group in listed[parallel.process() :: parallel.processes()]:
            if self.rounds is not None and module.groups > 1:
                federation, group_index = self.rounds.federation, self.rounds.federation.topology.group([client])[0]
                self.copied.load(module, federation.server.rows[group_index], federation.buffers.values[group_index])
            self._evaluate(trainer, module, client, group, model)

    def _groups(self, data: Any, round: int) -> dict[str, list[int]]:
        """Choose the clients to evaluate in this round, by group; the same in every process."""
        taking_part = set(data.plan.sample(round))
        others = [client for client, part in enumerate(data.tests) if len(part) and client not in taking_part]
        found = {PARTICIPANTS: sorted(taking_part), OTHERS: _some(others, self.fraction, self.seed, round)}
        return {group: found[group] for group in self.who}

    def _evaluate(self, trainer: Any, module: ClientModule, client: int, group: str, model: str) -> None:
        """Evaluate the copy on a client's test part, and keep its metrics if its logits, or losses, are finite."""
        part = trainer.datamodule.tests[client]
        if not len(part):
            return
        figures = self._metrics(trainer, module, torch.as_tensor(part))
        if figures is not None:
            self.found.append(Row(client, group, model, len(part), figures))

    def _metrics(self, trainer: Any, module: ClientModule, part: Tensor) -> Mapping[str, float] | None:
        """Compute the metrics of the copy on samples; of sequences loss and exact match alone. None: not finite."""
        if trainer.datamodule.dataset.sequences:
            scores = self.copied.scores(Batches.of(trainer), module, trainer.datamodule.dataset.test, part)
            found = {"loss": mean_loss(scores), "top1": float(scores["correct"].double().mean())}
            finite = bool(scores["losses"].isfinite().all())
            return {name: found[name] for name in self.metrics if name in found} if finite else None
        logits, y, losses = self.copied.outputs(trainer, module, part)
        return metrics_of(logits, y, losses, self.metrics, self.average) if bool(logits.isfinite().all()) else None

    def _close(self, round: int) -> None:
        """Gather the rows of all processes, sort and write them, and compute the figures."""
        rows = sorted((row for rows in parallel.gather(self.found) for row in rows), key=lambda row: row.sort_key)
        more = {row.client: [] if self.balance is None else self.balance.cells(row.client) for row in rows}
        self.table.append(row.line(round, self.metrics, more[row.client]) for row in rows)
        self.figures = columns(rows, self.metrics)


class Participants(Watcher):
    """Evaluates the participants of a round, before the next cohort overwrites their rows.

    Args:
        personal: the evaluation.
        trainer: of the run.
        module: trains the cohorts.

    """

    def __init__(self, personal: Personal, trainer: lightning.Trainer, module: ClientModule) -> None:
        self.personal, self.trainer, self.module = personal, trainer, module

    def receive(self, round: Round, trained: Update, received: Update) -> None:
        """Evaluate the models that a cohort has received and trained."""
        group = round.federation.topology.group(trained.clients)
        self.personal.participants(self.trainer, self.module, trained, group)


def _some(clients: Sequence[int], fraction: float, seed: int, round: int) -> list[int]:
    """Draw a fraction of the clients, at least one if there are any, sorted."""
    count = min(len(clients), max(1, floor(fraction * len(clients) + 0.5)))
    rng = generator(seed, Purpose.PERSONAL, round)
    return [clients[index] for index in np.sort(rng.permutation(len(clients))[:count])]


def _check_some(key: str, given: Any, choices: Collection[str]) -> None:
    """Refuse a value that is no list of some of the choices."""
    if not isinstance(given, list | tuple) or not given or any(name not in choices for name in given):
        raise ValueError(f"evaluation.{key} is {given!r}; it must be a list of some of {', '.join(choices)}")


def _check(average: Any, every: Any, fraction: Any) -> None:
    """Refuse single values out of range."""
    check_choice("evaluation.average", average, *AVERAGES)
    check_number("evaluation.every", every, whole=True, least=1)
    check_number("evaluation.fraction", fraction, above=0, most=1)
