"""What clients minimise beside their loss: terms that are added to their gradients.

Shapes: K clients of the cohort, P coordinates of which n train, N clients in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsparse.core.checks import check_number
from fedsparse.core.subspace import Coordinates, Move
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
    options = {key: optimizer.defaults[key] for key in ("momentum", "dampening", "nesterov")}
    return tuple(step_weight(sum(1 for n in steps if n), **options) for steps in zip(*count, strict=True))


class Objective(Protocol):
    """Adds to the clients' gradients.

    Attributes:
        messages: rows of values that travel each way beside the update, counted as messages of their own.
        stores: what the clients keep for it, by name.

    """

    messages: int
    stores: dict[str, ClientStore]

    def start(self, theta: Tensor, clients: Sequence[int], trained: Coordinates) -> None:
        """Note where K clients start, rows (K, P)."""

    def correct(self, rows: Rows) -> None:
        """Add to the gradients of a local step."""

    def finish(self, change: Tensor, clients: Sequence[int], lr: float, steps: Sequence[float]) -> Kept:
        """Learn what K clients changed, (K, n): what they keep, by the store's name."""

    def take(self, name: str, clients: Sequence[int], rows: Tensor) -> None:
        """Learn what clients will keep, before the store is told."""

    def close(self) -> None:
        """End a round, when all clients have been heard."""

    def follow(self, move: Move) -> None:
        """Let other coordinates train from now on."""

    def state_dict(self) -> dict[str, Any]:
        """What lasts over rounds on the server."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""


class Plain:
    """The loss alone."""

    messages = 0

    def __init__(self) -> None:
        self.stores: dict[str, ClientStore] = {}

    def start(self, theta: Tensor, clients: Sequence[int], trained: Coordinates) -> None:
        """Nothing to note."""

    def correct(self, rows: Rows) -> None:
        """Nothing to add."""

    def finish(self, change: Tensor, clients: Sequence[int], lr: float, steps: Sequence[float]) -> Kept:
        """Nothing is kept."""
        return {}

    def take(self, name: str, clients: Sequence[int], rows: Tensor) -> None:
        """Nothing to learn."""

    def close(self) -> None:
        """Nothing to end."""

    def follow(self, move: Move) -> None:
        """Nothing to carry over."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing lasts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""


class FedProx(Plain):
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

    def start(self, theta: Tensor, clients: Sequence[int], trained: Coordinates) -> None:
        """Keep the start."""
        self.anchor = theta.detach().clone()

    def correct(self, rows: Rows) -> None:
        """Add mu times the way from the start."""
        for gradient, value, anchor in zip(rows.gradients, rows.views, rows.parts(self.anchor), strict=True):
            gradient.add_(value.detach() - anchor, alpha=self.mu)


class Scaffold(Plain):
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
        self.moved: Tensor | None = None  # what c will change by when the round closes: all clients of one start alike

    def start(self, theta: Tensor, clients: Sequence[int], trained: Coordinates) -> None:
        """Look the variates up; the correction of what does not train is 0."""
        like = trained.of(theta.detach())
        if self.mean is None:
            self.mean = torch.zeros(like.shape[1], dtype=torch.float64, device=like.device)
        self.mean = self.mean.to(like.device)
        self.own = read(self.stores[VARIATES], clients, torch.zeros_like(like))
        self.correction = torch.zeros_like(theta)
        trained.write(self.correction, self.mean.to(like.dtype) - self.own)

    def correct(self, rows: Rows) -> None:
        """Add c - c_i."""
        for gradient, part in zip(rows.gradients, rows.parts(self.correction), strict=True):
            gradient.add_(part)

    def finish(self, change: Tensor, clients: Sequence[int], lr: float, steps: Sequence[float]) -> Kept:
        """Renew the clients' variates."""
        assert self.mean is not None
        far = change.new_tensor([lr * max(a, 1.0) for a in steps]).unsqueeze(1)
        return {VARIATES: (tuple(clients), self.own - self.mean.to(change.dtype) - change / far)}

    def take(self, name: str, clients: Sequence[int], rows: Tensor) -> None:
        """Sum what changes in the clients' variates."""
        if name == VARIATES:
            before = read(self.stores[VARIATES], clients, torch.zeros_like(rows))
            moved = (rows.double() - before.double()).sum(0) / self.num_clients
            self.moved = moved if self.moved is None else self.moved + moved

    def close(self) -> None:
        """Let c follow the clients' variates."""
        if self.mean is not None and self.moved is not None:
            self.mean += self.moved.to(self.mean.device)
        self.moved = None

    def follow(self, move: Move) -> None:
        """Carry the server's variate over; the clients' lie in their store."""
        self.mean = None if self.mean is None else move(self.mean)

    def state_dict(self) -> dict[str, Any]:
        """The server's variate."""
        return {"mean": None if self.mean is None else self.mean.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.mean = state["mean"]
