"""Figures of every client's own model: the global one, with the coordinates and buffers that stay with the client.

Shapes: P coordinates, n of them train.
"""

from __future__ import annotations

import lightning
import numpy as np
import torch

from fedsparse.core import parallel
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.copied import CopiedNet
from fedsparse.simulation.evaluation import mean_loss, spread
from fedsparse.simulation.module import ClientModule


class OwnModels(lightning.Callback):
    """Evaluates own models on their clients' parts of the test split.

    The global model holds no trained value of what stays: with B of LoRA kept it computes with B = 0. So every client
    that has a test part is evaluated, whether it took part in the round or not. After an evaluation ``figures`` has
    ``personal/acc_mean``, ``personal/acc_worst10``, ``personal/acc_std`` (unweighted, over clients) and
    ``personal/loss``.

    Args:
        rounds: of the federation, whose stores have the values.

    Attributes:
        figures: of the last evaluation.

    """

    def __init__(self, rounds: FederatedRounds) -> None:
        self.rounds = rounds
        self.figures: dict[str, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Copy the network, before its parameters become views into a row."""
        self.copied = CopiedNet(module.net)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Clear the last evaluation."""
        self.figures = {}

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Evaluate the own models, divided among the processes."""
        tests = trainer.datamodule.tests  # type: ignore[attr-defined]
        holders = [client for client, part in enumerate(tests) if len(part)]
        found = dict[int, tuple[float, float]]()
        for client in holders[parallel.process() :: parallel.processes()]:
            self._load(module, client)
            scores = self.copied.scores(trainer, module, torch.as_tensor(tests[client]))
            found[client] = float(scores["correct"].double().mean()), mean_loss(scores)
        everyone = {client: pair for part in parallel.gather(found) for client, pair in part.items()}
        if everyone:
            accuracies, losses_of = (np.array(part) for part in zip(*(everyone[c] for c in holders), strict=True))
            self.figures = {**spread("personal/acc", accuracies), "personal/loss": float(losses_of.mean())}
            module.log_dict(self.figures, logger=False, batch_size=1)

    def _load(self, module: ClientModule, client: int) -> None:
        """Load a client's own model into the copy."""
        federation = self.rounds.federation
        server, clients, (group,) = federation.server, federation.clients, federation.topology.group([client])
        row = server.rows[group].clone()
        if clients.local is not None:
            values = server.subspace.of(row).unsqueeze(0)
            server.subspace.write(row, federation.restored([client], values, clients.local)[0])
        self.copied.load(module, row, clients.buffers.of(client, group))
