"""Initialisation of the head: as built, by federated steps of the head alone, or by ridge regression.

Shapes: ``D`` input features of the head, ``C`` classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.core.checks import check_choice, check_flag, check_number
from fedsparse.core.seeding import Purpose
from fedsparse.core.space import Patterns, parameters_of
from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.wire.message import length
from fedsparse.federation.reports import left_out
from fedsparse.models.head import Statistics, features, head_of, temperature
from fedsparse.preparation.preparation import Preparation
from fedsparse.preparation.tasks import HeadGradient, HeadStatistics

log = logging.getLogger("fedsparse")
DIVERGED = "{}, so the run stops; try a smaller calibration.head_lr, or head.init=closed_form"
INITS = ("random", "probe", "closed_form")


@dataclass(frozen=True)
class Head:
    """Options of the head's initialisation (``head`` of ``conf/train.yaml``).

    Args:
        init: ``random``: as the model was built; ``probe``: ``calibration.head_steps`` federated steps of the head
            alone; ``closed_form``: ridge regression, in one round.
        frozen: whether the prepared head does not train, and is not sent in rounds.
        ridge: L2 penalty of ``closed_form``, 0 or more.

    Raises:
        ValueError: an option outside these choices.

    """

    init: str = "probe"
    frozen: bool = False
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("head.init", self.init, *INITS)
        check_flag("head.frozen", self.frozen)
        check_number("head.ridge", self.ridge, least=0)


def prepare_head(preparation: Preparation, head: Head, patterns: Patterns, steps: int, lr: float) -> None:
    """Initialise the head by ``head.init``, in place.

    Args:
        preparation: its network's head is changed.
        head: options of the initialisation.
        patterns: names of the head's parameters.
        steps: federated steps of ``probe``.
        lr: their learning rate.

    """
    if head.init == "probe":
        probe(preparation, patterns, steps, lr)
    elif head.init == "closed_form":
        solve(preparation, patterns, head.ridge)


def probe(preparation: Preparation, head: Patterns, steps: int, lr: float) -> None:
    """Take federated SGD steps of the head alone: each client sends the gradient of one batch, the server averages.

    So runs of all mask rules start from the same head. With a head of zeros the Fisher information of the backbone is
    0, and with a random one it misleads. Gradients that are not finite are left out, and their clients logged.

    Raises:
        Diverged: no client's gradient is finite, or the head is not.

    """
    parameters = parameters_of(preparation.net, head)
    message, lost = length(*parameters), set[int]()
    for step in range(steps):
        clients = preparation.sample(step, Purpose.HEAD)
        gradients, bad = _mean_gradient(preparation, parameters, HeadGradient(head, step), clients)
        lost |= bad
        if bad == set(clients):
            why = f"head step {step + 1}: the loss or gradient of every client is NaN or infinite"
            raise Diverged(DIVERGED.format(why))
        _descend(parameters, gradients, lr)
        preparation.ledger.first_model(clients, preparation.model_length)
        preparation.ledger.setup(len(clients), up=message, down=message)
        preparation.ledger.client_steps += len(clients)
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise Diverged(DIVERGED.format("the head became NaN or infinite"))
    if lost:
        log.warning("head: %s", left_out(lost, "NaN or infinity in loss or gradient"))


@torch.no_grad()
def _descend(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], lr: float) -> None:
    """Take one step of plain SGD."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.sub_((lr * gradient).to(parameter.dtype))


def _mean_gradient(
    preparation: Preparation, parameters: list[nn.Parameter], task: HeadGradient, clients: Sequence[int]
) -> tuple[list[Tensor], set[int]]:
    """Average the head's gradients on one batch a client, by its samples, in float64; also the clients left out."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    finite: dict[int, Tensor] = {}  # read once a step, since reading synchronises host and device
    for client, gradients in zip(clients, preparation.gather(preparation, task, clients), strict=True):
        if gradients is not None:
            finite[client] = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(torch.where(finite[client], gradient, 0.0), alpha=len(preparation.parts[client]))
    flags = torch.stack(list(finite.values())).tolist() if finite else []
    lost = set(clients) - {client for client, good in zip(finite, flags, strict=True) if good}
    samples = sum(len(preparation.parts[client]) for client in clients if client not in lost)
    return [total / max(1, samples) for total in sums], lost


def solve(preparation: Preparation, patterns: Patterns, ridge: float) -> None:
    """Set the head to the ridge regression on all clients' features, from statistics that each sends once (Fed3R).

    Fanì, Camoriano, Caputo and Ciccone 2024, "Accelerating Heterogeneous Federated Learning with Closed-form
    Classifiers". The solution is that on the pooled data, for any partition. For training, its logits are divided by
    the temperature with the smallest cross-entropy on the validation split: least squares fits targets 0 and 1, which
    as logits give nearly uniform probabilities. Statistics that are not finite are left out, and their clients logged.

    Raises:
        ValueError: the head is not one linear layer, or the equations are singular at ``head.ridge=0``.
        Diverged: no client's statistics are finite.

    """
    layer = head_of(preparation.net, patterns)
    clients = preparation.eligible
    answers = zip(clients, preparation.gather(preparation, HeadStatistics(patterns), clients), strict=True)
    sums = {client: Statistics.received(answer) for client, answer in answers if answer is not None}
    good = [client for client in sums if all(bool(part.isfinite().all()) for part in sums[client].tensors)]
    if not good:
        raise Diverged("the features of every client are NaN or infinite, so the run stops; look at the data's range")
    if lost := set(clients) - set(good):
        log.warning("head: %s", left_out(lost, "NaN or infinity in the features"))
    weight, bias = reduce(add, (sums[client] for client in good)).solve(ridge)
    everything = np.arange(len(preparation.dataset.val.y))
    pairs = [
        (features(preparation.net, layer, x), y) for x, y in preparation.batches(preparation.dataset.val, everything)
    ]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    heat = temperature(x.double() @ weight.T + bias, y)
    with torch.no_grad():
        layer.weight.copy_(weight / heat)
        if layer.bias is not None:
            layer.bias.copy_(bias / heat)
    down = length(*layer.parameters())
    preparation.ledger.first_model(clients, preparation.model_length)
    preparation.ledger.setup(len(clients), up=length(*sums[good[0]].tensors), down=down)
