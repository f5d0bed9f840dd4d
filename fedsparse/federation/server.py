"""The server: global rows and the ``torch.optim`` optimizer that is fed the mean change as a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsparse.federation.aggregation import Change

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Server:
    """Global rows (G, P) under an optimizer (FedOpt, Reddi et al. 2021, algorithm 2).

    SGD with learning rate 1 is FedAvg. Its state is the optimizer's, which Lightning stores; its row is the network's.

    Args:
        rows: (G, P) global rows; kept, not copied.
        make_optimizer: builds the optimizer of a list of parameters.
        trained: bool (P,), which coordinates train; the others keep their bits whatever the optimizer does.

    """

    def __init__(self, rows: Tensor, make_optimizer: MakeOptimizer, trained: Tensor) -> None:
        self.rows = rows
        self.optimizer = make_optimizer([self.rows])
        self.trained = None if bool(trained.all()) else trained.to(rows.device)

    def broadcast(self, group: Sequence[int]) -> Tensor:
        """Rows (K, P) that K clients of these groups start from."""
        if len(self.rows) == 1:
            return self.rows.expand(len(group), -1)
        return self.rows[torch.tensor(group, device=self.rows.device)]

    @torch.no_grad()
    def step(self, change: Change) -> None:
        """Take one server step along the mean change; coordinates that nobody touched stay."""
        moved = self._moved(change.touched)
        before = None if moved is None else self.rows.clone()
        self.rows.grad = change.rows.neg().to(self.rows.dtype)
        self.optimizer.step()
        self.rows.grad = None
        if before is not None and moved is not None:
            self.rows.copy_(torch.where(moved, self.rows, before))

    def _moved(self, touched: Tensor | None) -> Tensor | None:
        """Coordinates that may move: trained and touched; None for all."""
        if touched is None or self.trained is None:
            return touched if self.trained is None else self.trained
        return touched & self.trained
