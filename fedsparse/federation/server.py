"""The server: global rows and the ``torch.optim`` optimizer that is fed the mean change as a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsparse.federation.aggregation import Change
from fedsparse.places import Coordinates

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Server:
    """Global rows (G, P) under an optimizer (FedOpt, Reddi et al. 2021, algorithm 2).

    SGD with learning rate 1 is FedAvg. Its state is the optimizer's, which Lightning stores; its row is the network's.

    Args:
        rows: (G, P) global rows; kept, not copied.
        make_optimizer: builds the optimizer of a list of parameters.
        trained: which n of the P coordinates train; the optimizer has only these.

    """

    def __init__(self, rows: Tensor, make_optimizer: MakeOptimizer, trained: Coordinates) -> None:
        self.rows, self.trained = rows, trained
        self.values = trained.of(rows)  # (G, n); the rows themselves if everything trains
        self.optimizer = make_optimizer([self.values])

    def broadcast(self, group: Sequence[int]) -> Tensor:
        """Trained values (K, n) that K clients of these groups start from."""
        if len(self.values) == 1:
            return self.values.expand(len(group), -1)
        return self.values[torch.tensor(group, device=self.values.device)]

    @torch.no_grad()
    def step(self, change: Change) -> None:
        """Take one server step along the mean change; coordinates that nobody touched stay."""
        before = None if change.touched is None else self.values.clone()
        self.values.grad = change.rows.to(self.values.dtype, copy=True).neg_()
        self.optimizer.step()
        self.values.grad = None
        if before is not None and change.touched is not None:
            self.values.copy_(torch.where(change.touched, self.values, before))
        if self.values is not self.rows:
            self.trained.write(self.rows, self.values)
