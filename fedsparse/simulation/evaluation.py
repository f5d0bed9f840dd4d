"""Evaluation of the global models on validation and test split, and on every client's part of the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from fedsparse.core import parallel

SPLITS = ("val", "test")


def client_figures(correct: np.ndarray, tests: Sequence[np.ndarray], groups: Sequence[int] = ()) -> dict[str, float]:
    """Compute the clients' accuracies: mean, mean of the worst tenth, and standard deviation.

    Args:
        correct: bool (N, G), whether each global model classified each sample of the test split correctly.
        tests: for every client the indices of its test part; a client without one is left out.
        groups: for every client its global model; empty if there is one.

    >>> figures = client_figures(np.array([[1], [1], [0], [0]]), [np.array([0, 1]), np.array([1, 2])])
    >>> figures["client/acc_mean"], figures["client/acc_worst10"], figures["client/acc_std"]
    (0.75, 0.5, 0.25)
    """
    holders = [client for client, part in enumerate(tests) if len(part)]
    if not holders:
        return {}
    sizes = np.array([len(tests[client]) for client in holders])
    models = np.repeat([groups[client] if groups else 0 for client in holders], sizes)
    right = correct[np.concatenate([tests[client] for client in holders]), models]
    hits = np.add.reduceat(right.astype(np.float64), sizes.cumsum() - sizes)
    return spread("client/acc", hits / sizes)


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Compute mean, mean of the lowest tenth, and standard deviation of clients' figures.

    >>> spread("acc", np.array([0.5, 1.0]))
    {'acc_mean': 0.75, 'acc_worst10': 0.5, 'acc_std': 0.25}
    """
    ordered = np.sort(values)
    lowest = ordered[: max(1, len(ordered) // 10)]
    return {
        f"{name}_mean": float(ordered.mean()),
        f"{name}_worst10": float(lowest.mean()),
        f"{name}_std": float(ordered.std()),
    }


def split_figures(name: str, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute loss and accuracy of a split, means over N samples and G models; of sequences the perplexity too.

    Args:
        name: of the split.
        scores: ``correct``, bool (N, G), ``losses`` (N, G), and of sequences ``targets`` and ``weights`` (N,).

    Returns:
        ``<name>/loss`` and ``<name>/acc``; of sequences also ``<name>/perplexity``, exp of the mean over all targets.

    """
    losses, correct = scores["losses"].double(), scores["correct"]
    # as float32, which a metric of torchmetrics has
    found = {f"{name}/loss": float(losses.mean()), f"{name}/acc": float(correct.sum() / correct.numel())}
    if "targets" not in scores:
        return found
    found[f"{name}/loss"] = weighted_mean(losses, scores["weights"])
    return found | {f"{name}/perplexity": perplexity(weighted_mean(losses, scores["targets"]))}


def mean_loss(scores: Mapping[str, Tensor]) -> float:
    """Compute the mean of the losses (N,) of one model, by the weights of sequences if there are any."""
    losses = scores["losses"].double()
    return weighted_mean(losses.unsqueeze(1), scores["weights"]) if "weights" in scores else float(losses.mean())


def weighted_mean(losses: Tensor, weights: Tensor) -> float:
    """Compute the mean of losses (N, G) over models and over samples by weights (N,)."""
    exact = weights.double()
    return float((losses.double().mean(1) * exact).sum() / exact.sum())


def perplexity(loss: float) -> float:
    """Compute exp of a loss; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else loss * math.inf


def of_all(clients: Sequence[int]) -> Sequence[int]:
    """Map all clients to the one global model, by an empty list."""
    return ()


class Evaluation(lightning.Callback):
    """Collects the outputs of ``validation_step`` and logs their figures as callback metrics.

    After each validation ``figures`` has ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc``, ``client/acc_mean``,
    ``client/acc_worst10`` and ``client/acc_std``; where targets are sequences also ``val/perplexity`` and
    ``test/perplexity``, and an accuracy counts a sample whose targets are all right.

    Args:
        tests: for every client the indices of its test part.
        client_only: samples at the end of the test split of single clients, which test/loss and test/acc leave out.
        group: maps clients to the index of their global model; by default all share one.

    """

    def __init__(
        self,
        tests: Sequence[np.ndarray] = (),
        client_only: int = 0,
        group: Callable[[Sequence[int]], Sequence[int]] = of_all,
    ) -> None:
        self.tests, self.client_only, self.group = tests, client_only, group
        self.figures: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Evaluate after the last round too, if ``eval_every`` does not divide the rounds."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Clear the collected outputs."""
        self.seen: list[list[dict[str, Tensor]]] = [[], []]

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a batch's scores."""
        self.seen[dataloader_idx].append(outputs)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compute the figures and log them, for checkpoints and early stopping."""
        self.figures = {}
        for name, seen in zip(SPLITS, self._of_all(trainer), strict=True):
            whole = {key: torch.cat([batch[key] for batch in seen]) for key in seen[0]}
            common = len(whole["correct"]) - (self.client_only if name == "test" else 0)
            self.figures |= split_figures(name, {key: value[:common] for key, value in whole.items()})
        correct = whole["correct"].cpu().numpy()
        self.figures |= client_figures(correct, self.tests, self.group(range(len(self.tests))))
        pl_module.log_dict(self.figures, logger=False, batch_size=1)

    def _of_all(self, trainer: lightning.Trainer) -> list[list[dict[str, Tensor]]]:
        """Gather the batches of both splits in order; each of n processes has evaluated every n-th."""
        if not parallel.joined():
            return self.seen
        batches = [[{key: value.cpu() for key, value in batch.items()} for batch in seen] for seen in self.seen]
        everyone, loaders = parallel.gather(batches), trainer.val_dataloaders
        turns = len(everyone)
        return [
            [everyone[batch % turns][split][batch // turns] for batch in range(loader.total)]
            for split, loader in enumerate(loaders)  # type: ignore[arg-type]
        ]
