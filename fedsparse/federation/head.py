"""The head before anything else: as built, trained alone by the clients, or solved exactly from sums they send.

Shapes: ``D`` features that the head is given, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.federation.setting import Setting
from fedsparse.federation.wire import length
from fedsparse.keys import Purpose, generator
from fedsparse.models.head import Statistics, features, head_of, temperature
from fedsparse.models.modes import evaluating
from fedsparse.space import Patterns, matches

INITS = ("random", "probe", "closed_form")


@dataclass(frozen=True)
class Head:
    """How the head starts (``conf/head``).

    Args:
        init: ``random``: as the model was built; ``probe``: ``calibration.head_steps`` federated steps of the head
            alone; ``closed_form``: ridge regression, solved exactly in one round.
        frozen: whether the head stays as prepared, and is never sent.
        ridge: L2 penalty of ``closed_form``, 0 or more.

    Raises:
        ValueError: an option outside these choices.

    """

    init: str = "probe"
    frozen: bool = False
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.init not in INITS:
            raise ValueError(f"head.init is {self.init!r}; it must be one of {', '.join(INITS)}")
        if not isinstance(self.frozen, bool):
            raise ValueError(f"head.frozen is {self.frozen!r}; it must be true or false")
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool)
        if not number or not math.isfinite(self.ridge) or self.ridge < 0:
            raise ValueError(f"head.ridge is {self.ridge!r}; it must be a finite number of 0 or more")


def prepare_head(setting: Setting, head: Head, patterns: Patterns, steps: int, lr: float) -> None:
    """Let the head start as ``head.init`` says.

    Args:
        setting: what to work on; the network's head is changed.
        head: how.
        patterns: names of the head's parameters.
        steps: federated steps of ``probe``.
        lr: their learning rate.

    """
    if head.init == "probe":
        probe(setting, patterns, steps, lr)
    elif head.init == "closed_form":
        solve(setting, patterns, head.ridge)


def probe(setting: Setting, head: Patterns, steps: int, lr: float) -> None:
    """Take federated SGD steps of the head alone: each client sends the gradient of one batch, the server averages.

    All runs start from the same head so, whatever their mask rule; and a head of zeros, or a random one, would make the
    Fisher information of the backbone vanish, or mislead it.
    """
    parameters = [p for name, p in setting.net.named_parameters() if matches(name, head)]
    message = length(*parameters)
    with evaluating(setting.net):
        for step in range(steps):
            clients = setting.sample(step, Purpose.HEAD)
            _descend(parameters, _mean_gradient(setting, parameters, step, clients), lr)
            setting.ledger.first_model(clients, setting.model_length)
            setting.ledger.setup(len(clients), up=message, down=message)
            setting.ledger.client_steps += len(clients)


@torch.no_grad()
def _descend(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], lr: float) -> None:
    """Take one step of plain SGD."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.sub_((lr * gradient).to(parameter.dtype))


def _mean_gradient(setting: Setting, parameters: list[nn.Parameter], step: int, clients: Sequence[int]) -> list[Tensor]:
    """Mean gradient of the head over one batch of each client, weighted by samples held, in float64."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for client in clients:
        part = setting.parts[client]
        batch = generator(setting.seed, Purpose.HEAD, step, client).permutation(part)[: setting.batch_size]
        x, y = setting.take(setting.dataset.train, batch)
        gradients = torch.autograd.grad(setting.losses(setting.net, x, y).mean(), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient, alpha=len(part))
    held = sum(len(setting.parts[client]) for client in clients)
    return [total / held for total in sums]


def solve(setting: Setting, patterns: Patterns, ridge: float) -> None:
    """Set the head to the ridge regression on all clients' features, from sums that each sends once (Fed3R).

    Fanì, Camoriano, Caputo and Ciccone 2024, "Accelerating Heterogeneous Federated Learning with Closed-form
    Classifiers". The solution is that on the pooled data, whoever holds what. For training, its logits are divided by
    the temperature with the smallest cross-entropy on the validation split: least squares aims at 0 and 1, which as
    logits say nearly nothing.

    Raises:
        ValueError: the head is not one linear layer, or the equations are singular at ``head.ridge=0``.

    """
    layer = head_of(setting.net, patterns)
    clients = setting.eligible
    sums = [_statistics(setting, layer, setting.parts[client]) for client in clients]
    weight, bias = reduce(add, sums).solve(ridge)
    everything = np.arange(len(setting.dataset.val.y))
    pairs = [(features(setting.net, layer, x), y) for x, y in setting.batches(setting.dataset.val, everything)]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    heat = temperature(x.double() @ weight.T + bias, y)
    with torch.no_grad():
        layer.weight.copy_(weight / heat)
        if layer.bias is not None:
            layer.bias.copy_(bias / heat)
    down = length(*layer.parameters())
    setting.ledger.first_model(clients, setting.model_length)
    setting.ledger.setup(len(clients), up=length(*sums[0].tensors), down=down)


def _statistics(setting: Setting, layer: nn.Linear, part: np.ndarray) -> Statistics:
    """Sums of one client over all its samples, batch by batch."""
    classes = layer.out_features
    parts = (
        Statistics.of(features(setting.net, layer, x), y, classes)
        for x, y in setting.batches(setting.dataset.train, part)
    )
    return reduce(add, parts)
