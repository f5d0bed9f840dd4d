"""Figures of each client, and their means and spread over clients: pure functions.

Shapes: N samples of a client's test part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

PARTICIPANTS, OTHERS = GROUPS = ("participants", "non_participants")
START, LOCAL, GLOBAL = MODELS = ("start", "local", "global")
METRICS = ("loss", "top1", "top5", "f1", "precision", "recall")
AVERAGES = ("weighted", "macro", "micro")
MEANS = ("mean", "weighted")
GAPS = {
    "generalisation": ((OTHERS, GLOBAL), (PARTICIPANTS, LOCAL)),
    "local_start": ((PARTICIPANTS, LOCAL), (PARTICIPANTS, START)),
    "local_global": ((PARTICIPANTS, LOCAL), (PARTICIPANTS, GLOBAL)),
}
AVERAGED: dict[str, Callable[..., Tensor]] = {
    "f1": multiclass_f1_score,
    "precision": multiclass_precision,
    "recall": multiclass_recall,
}


@dataclass(frozen=True)
class Row:
    """One model on one client's test part.

    Attributes:
        client: its id.
        group: one of ``GROUPS``: whether the client takes part in the round.
        model: one of ``MODELS``: the global model before the round, the client's model after training, or the new
            global model.
        n: samples of its test part.
        figures: by metric.

    """

    client: int
    group: str
    model: str
    n: int
    figures: Mapping[str, float]

    def line(self, round: int, metrics: Sequence[str], more: Sequence[str] = ()) -> str:
        """Format the CSV line of a closed round, counted from 1; a metric without a value is left empty.

        Args:
            round: its number.
            metrics: in the order of the columns.
            more: cells of further columns.

        """
        values = [f"{self.figures[name]:.7g}" if name in self.figures else "" for name in metrics]
        return ",".join([str(round), str(self.client), self.group, self.model, str(self.n), *values, *more]) + "\n"

    @property
    def sort_key(self) -> tuple[int, int]:
        """Order in the file: by client, then by model in the order of ``MODELS``."""
        return self.client, MODELS.index(self.model)


def metrics_of(
    logits: Tensor, y: Tensor, losses: Tensor, metrics: Sequence[str] = METRICS, average: str = "weighted"
) -> dict[str, float]:
    """Compute the metrics of one model on N samples; top5 is left out if there are fewer than five classes.

    Args:
        logits: (N, classes).
        y: labels (N,).
        losses: of each sample (N,).
        metrics: some of ``METRICS``.
        average: of F1, precision and recall over classes: ``weighted`` by the class's samples, ``macro`` over the
            classes that occur or were predicted, or ``micro``. A class that divides by zero counts 0.

    >>> import torch
    >>> y = torch.tensor([0, 0, 1, 1])
    >>> logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    >>> found = metrics_of(logits, y, torch.ones(4), ["top1", "top5", "recall"], "macro")
    >>> found
    {'top1': 0.75, 'recall': 0.75}
    """
    possible = [name for name in metrics if name != "top5" or logits.shape[1] >= 5]
    return {name: float(_metric(name, logits, y, losses, average)) for name in possible}


def _metric(name: str, logits: Tensor, y: Tensor, losses: Tensor, average: str) -> Tensor:
    """Compute one metric."""
    classes = logits.shape[1]
    if name == "loss":
        return losses.double().mean()
    if name in AVERAGED:
        return AVERAGED[name](logits, y, num_classes=classes, average=average, validate_args=False)
    return multiclass_accuracy(
        logits, y, num_classes=classes, top_k=int(name[3:]), average="micro", validate_args=False
    )


def over_clients(values: Sequence[float], n: Sequence[int], highest_is_worst: bool = False) -> dict[str, float]:
    """Compute mean, mean by samples, standard deviation, and mean over the worst tenth of the clients (at least one).

    >>> over_clients([0.5, 1.0], [3, 1])
    {'mean': 0.75, 'weighted': 0.625, 'std': 0.25, 'worst10': 0.5}
    """
    each = np.array(values, dtype=np.float64)
    ordered = np.sort(-each if highest_is_worst else each)
    worst = float(ordered[: max(1, len(each) // 10)].mean())
    return {
        "mean": float(each.mean()),
        "weighted": float(np.average(each, weights=n)),
        "std": float(each.std()),
        "worst10": -worst if highest_is_worst else worst,
    }


def columns(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Compute the figures of a round by their column in metrics.csv, such as ``participants/local/top1_mean``.

    Args:
        rows: of all evaluated clients, sorted, so that sums do not depend on the order of evaluation.
        metrics: in the order of the columns.

    """
    found: dict[str, float] = {}
    for group, model in product(GROUPS, MODELS):
        chosen = [row for row in rows if (row.group, row.model) == (group, model)]
        for name in [name for name in metrics if chosen and name in chosen[0].figures]:
            spread = over_clients([row.figures[name] for row in chosen], [row.n for row in chosen], name == "loss")
            found |= {f"{group}/{model}/{name}_{kind}": value for kind, value in spread.items()}
    return found | dict(gaps(found, metrics))


def gaps(found: Mapping[str, float], metrics: Sequence[str] = METRICS) -> Iterator[tuple[str, float]]:
    r"""Compute differences between groups and models, of plain and weighted means, where both exist.

    The generalisation gap is out minus in, as AutoFLIP's server computes it: with S the round's participants, m a
    metric on a client's own test part, x' the new global model and y_k a participant's own model after training,

    .. math::
        \text{gap} = \operatorname{mean}_{k \notin S} m_k(x') - \operatorname{mean}_{k \in S} m_k(y_k),

    so that a negative gap in accuracy means that non-participants do worse. It changes clients and model at once; the
    other two compare the same clients: ``local_start`` is the effect of local training, and ``local_global`` what a
    participant loses (above 0) or gains (below) with the new global model instead of its own.
    """
    for (gap, (one, other)), metric, mean in product(GAPS.items(), metrics, MEANS):
        first, second = (found.get(f"{group}/{model}/{metric}_{mean}") for group, model in (one, other))
        if first is not None and second is not None:
            yield f"gap/{gap}/{metric}_{mean}", first - second
