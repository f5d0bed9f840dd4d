"""Drift corrections (FedProx, SCAFFOLD): terms added to the clients' gradients, so that clients do not drift apart.

Shapes: K clients of the cohort, P coordinates of which n train, N clients in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_number
from fedsparse.core.subspace import Carry, Subspace
from fedsparse.federation.client.bound import BoundRow
from fedsparse.federation.client.stacked import StackedRows
from fedsparse.federation.client.whole import WholeRow
from fedsparse.federation.stores.store import ClientStore, Kept, MemoryStore, read

Rows = BoundRow | WholeRow | StackedRows
VARIATES = "variates"


@cache
def step_weight(steps: int, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    r"""Sum a client's step weights, :math:`\lVert a \rVert_1` of FedNova (Wang et al. 2020).

    It is the distance that SGD with momentum moves in so many steps, on gradients of 1 at a learning rate of 1.

    >>> step_weight(3), step_weight(2, momentum=0.5)
    (3.0, 2.5)
    """
    buffer = total = 0.0
    for step in range(steps):
        buffer = momentum * buffer + (1 - dampening) if step else 1.0
        total += 1 + momentum * buffer if nesterov else (buffer if momentum else 1.0)
    return total


def step_weights(count: Sequence[Sequence[int]], optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Sum the step weights of K clients, of an optimizer's momentum: ``count`` [S][K] real samples of each step."""
    options = {key: optimizer.defaults.get(key, 0) for key in ("momentum", "dampening", "nesterov")}
    return tuple(step_weight(sum(1 for n in steps if n), **options) for steps in zip(*count, strict=True))


class GradientCorrection:
    """The correction of K clients' gradients in one round; this one adds nothing."""

    def correct(self, rows: Rows) -> None:
        """Add the correction to the gradients of a local step, in place."""

    def finish(self, change: Tensor, lr: float, steps: Sequence[float]) -> Kept:
        """Compute what the clients store after the round.

        Args:
            change: (K, n), of each client.
            lr: the clients' learning rate.
            steps: K sums of step weights.

        """
        return {}


class DriftCorrection:
    """The drift correction of a run (``conf/objective``); this base class corrects nothing.

    Attributes:
        corrects: whether gradients may be changed.
        messages: rows of values that travel each way beside the update, in the same message and never rounded.
        stores: of the clients' rows that the correction needs, by name.

    """

    messages = 0
    corrects = True

    def __init__(self) -> None:
        self.stores: dict[str, ClientStore] = {}

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Replace the stores by those that ``make`` builds by name."""
        self.stores = {name: make(name) for name in self.stores}

    def start(self, theta: Tensor, clients: Sequence[int], subspace: Subspace) -> GradientCorrection:
        """Build the correction of K clients that start from rows (K, P)."""
        return GradientCorrection()

    def broadcast(self, like: Tensor) -> Tensor:
        """Gather what the server sends every client beside a row (n,): ``messages`` rows of values, in one."""
        return like[:0]

    def take(self, values: Tensor) -> None:
        """Take over what the server sent, ``broadcast`` of it, where a client is alone with its data."""

    def update(self, kept: Kept) -> None:
        """Take in the rows that clients will store, before they are written."""

    def close(self) -> None:
        """Close a round, after ``update`` for all clients."""

    def move(self, carry: Carry) -> None:
        """Carry the server's state over to another mask."""

    def state_dict(self) -> dict[str, Any]:
        """State on the server that outlives a round."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this state from a checkpoint."""


class NoCorrection(DriftCorrection):
    """No correction: clients minimise their loss."""

    corrects = False


class FedProx(DriftCorrection):
    r"""Proximal term :math:`\mu / 2 \lVert \theta - \theta_0 \rVert^2` of the loss (Li et al. 2020, equation 2).

    It is 0 for frozen coordinates, which do not move.

    Args:
        mu: weight of the term, 0 or more.

    Raises:
        ValueError: mu is negative or not finite.

    """

    def __init__(self, mu: float = 0.01) -> None:
        super().__init__()
        check_number("objective.mu", mu, least=0)
        self.mu = mu

    def start(self, theta: Tensor, clients: Sequence[int], subspace: Subspace) -> GradientCorrection:
        """Copy the start of K clients."""
        return ProximalCorrection(theta.detach().clone(), self.mu)


@dataclass(frozen=True)
class ProximalCorrection(GradientCorrection):
    """Correction of FedProx: ``mu`` times the way from the start (K, P)."""

    start: Tensor
    mu: float

    def correct(self, rows: Rows) -> None:
        """Add the gradient of the proximal term, in place."""
        for gradient, value, start in zip(rows.gradients, rows.views, rows.parts(self.start), strict=True):
            gradient.add_(value.detach() - start, alpha=self.mu)


class Scaffold(DriftCorrection):
    r"""Control variates: gradients are corrected by :math:`c - c_i` (Karimireddy et al. 2020, option II).

    A client's variate becomes :math:`c_i - c + (x - y_i) / (\eta \lVert a_i \rVert_1)`; all start at 0, so that c is
    their mean over all N clients. With gradient clipping the corrected gradient is clipped. Variates travel both ways.

    Args:
        num_clients: N.
        store: of the clients' variates; in memory by default.

    Attributes:
        mean: c, float64 (n,); None before the first round.
        shift: of c in the open round; None without updates.

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
        """Read the variates of K clients; the correction of frozen coordinates is 0."""
        like = subspace.of(theta.detach())
        if self.mean is None:
            self.mean = torch.zeros(like.shape[1], dtype=torch.float64, device=like.device)
        self.mean = self.mean.to(like.device)
        variates, mean = read(self.stores[VARIATES], clients, torch.zeros_like(like)), self.mean.to(like.dtype)
        difference = torch.zeros_like(theta)
        subspace.write(difference, mean - variates)
        return VariateCorrection(tuple(clients), variates, mean, difference)

    def broadcast(self, like: Tensor) -> Tensor:
        """The server's variate c, as clients use it."""
        return torch.zeros_like(like) if self.mean is None else self.mean.to(like)

    def take(self, values: Tensor) -> None:
        """Take over c."""
        self.mean = values.double()

    def update(self, kept: Kept) -> None:
        """Add the changes of the clients' variates, over N, to the shift of c."""
        if VARIATES in kept:
            clients, rows = kept[VARIATES]
            before = read(self.stores[VARIATES], clients, torch.zeros_like(rows))
            shift = (rows.double() - before.double()).sum(0) / self.num_clients
            self.shift = shift if self.shift is None else self.shift + shift

    def close(self) -> None:
        """Add the shift to c."""
        if self.shift is not None:  # a server whose clients are elsewhere has no c before the first shift
            self.mean = self.shift if self.mean is None else self.mean.add_(self.shift.to(self.mean.device))
        self.shift = None

    def move(self, carry: Carry) -> None:
        """Carry c over to another mask; the clients' variates are carried by their store."""
        self.mean = None if self.mean is None else carry(self.mean)

    def state_dict(self) -> dict[str, Any]:
        """The server's variate c, on the CPU."""
        return {"mean": None if self.mean is None else self.mean.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load c."""
        self.mean = state["mean"]


@dataclass(frozen=True)
class VariateCorrection(GradientCorrection):
    """Correction of SCAFFOLD: the variates c_i (K, n), their mean c (n,), and the difference c - c_i as (K, P)."""

    clients: tuple[int, ...]
    variates: Tensor
    mean: Tensor
    difference: Tensor

    def correct(self, rows: Rows) -> None:
        """Add c - c_i, in place."""
        for gradient, part in zip(rows.gradients, rows.parts(self.difference), strict=True):
            gradient.add_(part)

    def finish(self, change: Tensor, lr: float, steps: Sequence[float]) -> Kept:
        """Compute the clients' new variates."""
        far = change.new_tensor([lr * max(a, 1.0) for a in steps]).unsqueeze(1)
        return {VARIATES: (self.clients, self.variates - self.mean - change / far)}
