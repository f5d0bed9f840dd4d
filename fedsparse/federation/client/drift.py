"""What keeps clients from drifting apart: terms that are added to the gradients of their loss.

Shapes: K clients of the cohort, P coordinates of which n train, N clients in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_number
from fedsparse.core.subspace import Carry, Subspace
from fedsparse.federation.client.bound import BoundRow
from fedsparse.federation.client.stacked import StackedRows
from fedsparse.federation.stores.store import ClientStore, Kept, MemoryStore, read

Rows = BoundRow | StackedRows
VARIATES = "variates"


def step_weight(steps: int, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    r"""Sum a client's step weights, :math:`\lVert a \rVert_1` of FedNova (Wang et al. 2020).

    How far SGD with momentum goes in so many steps on gradients of 1 at a learning rate of 1.

    >>> step_weight(3), step_weight(2, momentum=0.5)
    (3.0, 2.5)
    """
    buffer = total = 0.0
    for step in range(steps):
        buffer = momentum * buffer + (1 - dampening) if step else 1.0
        total += 1 + momentum * buffer if nesterov else (buffer if momentum else 1.0)
    return total


def step_weights(count: Sequence[Sequence[int]], optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Sum the step weights of K clients: ``count`` [S][K] real samples of each step."""
    options = {key: optimizer.defaults.get(key, 0) for key in ("momentum", "dampening", "nesterov")}
    return tuple(step_weight(sum(1 for n in steps if n), **options) for steps in zip(*count, strict=True))


class GradientCorrection:
    """What is added to the gradients of K clients in one round: nothing, if no other says more."""

    def correct(self, rows: Rows) -> None:
        """Add to the gradients of a local step."""

    def finish(self, change: Tensor, lr: float, steps: Sequence[float]) -> Kept:
        """Say what the clients keep of a round in which they changed so much, (K, n)."""
        return {}


class DriftCorrection:
    """What clients minimise beside their loss; one that adds nothing, for others to build on.

    Attributes:
        messages: rows of values that travel each way beside the update, in the same message and never rounded.
        stores: what the clients keep for it, by name.

    """

    messages = 0

    def __init__(self) -> None:
        self.stores: dict[str, ClientStore] = {}

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Let the clients keep what it needs in other stores, made by name."""
        self.stores = {name: make(name) for name in self.stores}

    def start(self, theta: Tensor, clients: Sequence[int], subspace: Subspace) -> GradientCorrection:
        """Make the term of K clients that start from rows (K, P)."""
        return GradientCorrection()

    def update(self, kept: Kept) -> None:
        """Learn what clients will keep, before the stores are told."""

    def close(self) -> None:
        """End a round, when all clients have been heard."""

    def move(self, carry: Carry) -> None:
        """Let other coordinates train from now on."""

    def state_dict(self) -> dict[str, Any]:
        """What lasts over rounds on the server."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""


class NoCorrection(DriftCorrection):
    """The loss alone."""


class FedProx(DriftCorrection):
    r"""A pull back to the global model, :math:`\mu / 2 \lVert \theta - \theta_0 \rVert^2` (Li et al. 2020, equation 2).

    What does not train does not move, and so is not pulled.

    Args:
        mu: its strength, 0 or more.

    Raises:
        ValueError: mu is negative or not finite.

    """

    def __init__(self, mu: float = 0.01) -> None:
        super().__init__()
        check_number("objective.mu", mu, least=0)
        self.mu = mu

    def start(self, theta: Tensor, clients: Sequence[int], subspace: Subspace) -> GradientCorrection:
        """Keep the start."""
        return ProximalCorrection(theta.detach().clone(), self.mu)


@dataclass(frozen=True)
class ProximalCorrection(GradientCorrection):
    """Correction of FedProx: ``mu`` times the way from the start (K, P)."""

    start: Tensor
    mu: float

    def correct(self, rows: Rows) -> None:
        """Add it."""
        for gradient, value, start in zip(rows.gradients, rows.views, rows.parts(self.start), strict=True):
            gradient.add_(value.detach() - start, alpha=self.mu)


class Scaffold(DriftCorrection):
    r"""Gradients corrected by :math:`c - c_i`, against the drift of clients (Karimireddy et al. 2020, option II).

    A client's variate becomes :math:`c_i - c + (x - y_i) / (\eta \lVert a_i \rVert_1)`; all begin at 0, so that c is
    their mean over all N clients. With gradient clipping the corrected gradient is clipped. Variates travel both ways.

    Args:
        num_clients: N.
        store: where the clients keep theirs.

    Raises:
        ValueError: N is no whole number of 1 or more.

    """

    messages = 1

    def __init__(self, num_clients: int, store: ClientStore | None = None) -> None:
        super().__init__()
        check_number("objective.num_clients", num_clients, whole=True, least=1)
        self.num_clients = num_clients
        self.stores = {VARIATES: MemoryStore() if store is None else store}
        self.mean: Tensor | None = None
        self.shift: Tensor | None = None  # of c, added when the round closes, so that all its clients use one c

    def start(self, theta: Tensor, clients: Sequence[int], subspace: Subspace) -> GradientCorrection:
        """Look the variates up; the correction of what does not train is 0."""
        like = subspace.of(theta.detach())
        if self.mean is None:
            self.mean = torch.zeros(like.shape[1], dtype=torch.float64, device=like.device)
        self.mean = self.mean.to(like.device)
        variates, mean = read(self.stores[VARIATES], clients, torch.zeros_like(like)), self.mean.to(like.dtype)
        difference = torch.zeros_like(theta)
        subspace.write(difference, mean - variates)
        return VariateCorrection(tuple(clients), variates, mean, difference)

    def update(self, kept: Kept) -> None:
        """Sum what changes in the clients' variates."""
        if VARIATES in kept:
            clients, rows = kept[VARIATES]
            before = read(self.stores[VARIATES], clients, torch.zeros_like(rows))
            shift = (rows.double() - before.double()).sum(0) / self.num_clients
            self.shift = shift if self.shift is None else self.shift + shift

    def close(self) -> None:
        """Let c follow the clients' variates."""
        if self.mean is not None and self.shift is not None:
            self.mean += self.shift.to(self.mean.device)
        self.shift = None

    def move(self, carry: Carry) -> None:
        """Carry the server's variate over; the clients' lie in their store."""
        self.mean = None if self.mean is None else carry(self.mean)

    def state_dict(self) -> dict[str, Any]:
        """The server's variate."""
        return {"mean": None if self.mean is None else self.mean.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.mean = state["mean"]


@dataclass(frozen=True)
class VariateCorrection(GradientCorrection):
    """Correction of SCAFFOLD: the variates c_i (K, n), their mean c (n,), and the difference c - c_i as (K, P)."""

    clients: tuple[int, ...]
    variates: Tensor
    mean: Tensor
    difference: Tensor

    def correct(self, rows: Rows) -> None:
        """Add c - c_i."""
        for gradient, part in zip(rows.gradients, rows.parts(self.difference), strict=True):
            gradient.add_(part)

    def finish(self, change: Tensor, lr: float, steps: Sequence[float]) -> Kept:
        """Renew the clients' variates."""
        far = change.new_tensor([lr * max(a, 1.0) for a in steps]).unsqueeze(1)
        return {VARIATES: (self.clients, self.variates - self.mean - change / far)}
