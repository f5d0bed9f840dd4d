"""The server: global rows and the ``torch.optim`` optimizer that is fed the mean change as a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsparse.core.subspace import Coordinates, Move
from fedsparse.federation.server.aggregation import Change

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
UNTOUCHED = ("step", "hold", "freeze")


class Server:
    """Global rows (G, P) under an optimizer (FedOpt, Reddi et al. 2021, algorithm 2).

    SGD with learning rate 1 is FedAvg. Its state is the optimizer's, which Lightning stores; its row is the network's.

    Args:
        rows: (G, P) global rows; kept, not copied.
        make_optimizer: builds the optimizer of a list of parameters.
        trained: which n of the P coordinates train; the optimizer has only these.
        untouched: what becomes of a coordinate that nobody sent: ``step``, the moments move it; ``hold``, they decay
            and the value stays; ``freeze``, both stay.

    Raises:
        ValueError: another choice.

    """

    def __init__(
        self, rows: Tensor, make_optimizer: MakeOptimizer, trained: Coordinates, untouched: str = "hold"
    ) -> None:
        if untouched not in UNTOUCHED:
            raise ValueError(f"server.untouched is {untouched!r}; it must be one of {', '.join(UNTOUCHED)}")
        self.rows, self.trained, self.untouched = rows, trained, untouched
        self.values = trained.of(rows)  # (G, n); the rows themselves if everything trains
        self.optimizer = make_optimizer([self.values])

    def broadcast(self, group: Sequence[int]) -> Tensor:
        """Trained values (K, n) that K clients of these groups start from."""
        if len(self.values) == 1:
            return self.values.expand(len(group), -1)
        return self.values[torch.tensor(group, device=self.values.device)]

    @torch.no_grad()
    def follow(self, trained: Coordinates) -> None:
        """Let other coordinates train from now on: moments go along, and begin at 0 where a coordinate starts."""
        move, before = Move(self.trained, trained), self.values
        state = self.optimizer.state.pop(before, {})
        self.trained, self.values = trained, trained.of(self.rows)
        self.optimizer.param_groups[0]["params"] = [self.values]
        moments = {key: isinstance(t, Tensor) and t.shape == before.shape for key, t in state.items()}
        self.optimizer.state[self.values] = {key: move(t) if moments[key] else t for key, t in state.items()}

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Set the trained values (G, n) without a step of the optimizer."""
        self.values.copy_(values)
        if self.values is not self.rows:
            self.trained.write(self.rows, self.values)

    @torch.no_grad()
    def step(self, change: Change) -> None:
        """Take one server step along the mean change."""
        touched = None if self.untouched == "step" else change.touched
        before = [] if touched is None else [(tensor, tensor.clone()) for tensor in self._held()]
        self.values.grad = change.rows.to(self.values.dtype, copy=True).neg_()
        self.optimizer.step()
        self.values.grad = None
        for tensor, old in before:
            tensor.copy_(torch.where(touched, tensor, old))  # type: ignore[arg-type]
        if touched is not None and not before[1:] and self.untouched == "freeze":
            self._forget(touched)
        if self.values is not self.rows:
            self.trained.write(self.rows, self.values)

    def _held(self) -> list[Tensor]:
        """What stays at a coordinate that nobody sent: its value, and with ``freeze`` its moments."""
        return [self.values, *(self._moments() if self.untouched == "freeze" else [])]

    def _moments(self) -> list[Tensor]:
        """The optimizer's tensors that have an entry for each coordinate."""
        state = self.optimizer.state.get(self.values, {})
        return [t for t in state.values() if isinstance(t, Tensor) and t.shape == self.values.shape]

    def _forget(self, touched: Tensor) -> None:
        """Undo what a first step gave the moments of coordinates that nobody sent: they begin at 0."""
        for moment in self._moments():
            moment.mul_(touched)
