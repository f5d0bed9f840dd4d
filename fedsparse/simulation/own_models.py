"""Figures of every client's own model: the global one, with the coordinates and buffers that stay with the client.

Shapes: P coordinates, n of them train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import lightning
import numpy as np
import torch

from fedsparse.core import parallel
from fedsparse.core.monitor import PERSONAL_ACCURACY, PERSONAL_LOSS
from fedsparse.data.datasets import Split
from fedsparse.federation.federation import Federation
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.copied import Batches, CopiedNet
from fedsparse.simulation.evaluation import mean_loss, spread
from fedsparse.simulation.module import ClientModule

Pairs = dict[int, tuple[float, float]]  # accuracy and loss by client
Elsewhere = Callable[[Federation], tuple[Pairs, Pairs]]  # on the test and the validation split


def scored(
    copied: CopiedNet, how: Batches, module: ClientModule, split: Split, samples: np.ndarray
) -> tuple[float, float]:
    """Compute accuracy and loss of a copied network on samples of a split."""
    scores = copied.scores(how, module, split, torch.as_tensor(samples))
    return float(scores["correct"].double().mean()), mean_loss(scores)


class OwnModels(lightning.Callback):
    """Evaluates own models on their clients' parts of the test split and of the validation split.

    The global model holds no trained value of what stays: with B of LoRA kept it computes with B = 0. So every client
    that has a part is evaluated, whether it took part in the round or not. After an evaluation ``figures`` has of the
    test split ``personal/acc_mean``, ``personal/acc_worst10``, ``personal/acc_std`` and ``personal/loss``, and of the
    validation split ``val/personal_acc``, by which rounds are chosen, and ``val/personal_loss``: unweighted over the
    clients that have a part of the split; none of a split of which no client has one.

    Args:
        rounds: of the federation, whose stores have the values.
        elsewhere: evaluates the models where their clients are; None: they are in this process.

    Attributes:
        figures: of the last evaluation.

    """

    def __init__(self, rounds: FederatedRounds, elsewhere: Elsewhere | None = None) -> None:
        self.rounds, self.elsewhere = rounds, elsewhere
        self.figures: dict[str, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Copy the network, before its parameters become views into a row."""
        self.copied = CopiedNet(module.net)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Clear the last evaluation."""
        self.figures = {}

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Evaluate the own models, divided among the processes."""
        found = self._here(trainer, module) if self.elsewhere is None else self.elsewhere(self.rounds.federation)
        test, val = (_by_client(pairs) for pairs in zip(*parallel.gather(found), strict=True))
        if len(test):
            self.figures |= {**spread("personal/acc", test[:, 0]), "personal/loss": float(test[:, 1].mean())}
        if len(val):  # the accuracy as float32, in which checkpoints compare it, so that ties are ties everywhere
            accuracy, loss = float(np.float32(val[:, 0].mean())), float(val[:, 1].mean())
            self.figures |= {PERSONAL_ACCURACY: accuracy, PERSONAL_LOSS: loss}
        module.log_dict(self.figures, logger=False, batch_size=1)

    def _here(self, trainer: lightning.Trainer, module: ClientModule) -> tuple[Pairs, Pairs]:
        """Evaluate the models of this process's clients on test and validation split."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        splits = [(data.dataset.test, data.tests), (data.dataset.val, data.vals)]
        holders = sorted({client for _, parts in splits for client, part in enumerate(parts) if len(part)})
        found: tuple[Pairs, Pairs] = ({}, {})
        for client in holders[parallel.process() :: parallel.processes()]:
            self._load(module, client)
            for (split, parts), pairs in zip(splits, found, strict=True):
                if client < len(parts) and len(parts[client]):
                    pairs[client] = scored(self.copied, Batches.of(trainer), module, split, parts[client])
        return found

    def _load(self, module: ClientModule, client: int) -> None:
        """Load a client's own model into the copy."""
        federation = self.rounds.federation
        server, clients, (group,) = federation.server, federation.clients, federation.topology.group([client])
        row = server.rows[group].clone()
        if clients.local is not None:
            values = server.subspace.of(row).unsqueeze(0)
            server.subspace.write(row, federation.restored([client], values, clients.local)[0])
        self.copied.load(module, row, clients.buffers.of(client, group))


def _by_client(found: Sequence[Mapping[int, tuple[float, float]]]) -> np.ndarray:
    """Order the accuracies and losses of all processes by client: (N, 2), or (0,) of no client."""
    everyone = {client: pair for pairs in found for client, pair in pairs.items()}
    return np.array([everyone[client] for client in sorted(everyone)])
