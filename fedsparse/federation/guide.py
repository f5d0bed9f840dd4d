"""What clients tell the mask rule in a round: a weighted mean, additive over clients, cohorts and processes.

Shapes: K clients of the cohort, n coordinates that train.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsparse.core import parallel
from fedsparse.federation.server.aggregation import add_scaled


class Guide:
    """Sums of a round, in float64.

    Args:
        size: n.
        device: where the sums are kept.

    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.vector = torch.zeros(size + 2, dtype=torch.float64, device=device)
        self.weight = self.loss = 0.0

    def add(self, told: Tensor, weight: Sequence[float], loss: Sequence[float]) -> None:
        """Add what K clients tell, (K, n), in client order; one of weight 0 tells nothing.

        What was too large for the dtype counts as its largest number, so that one client stays one.
        """
        for row, own, value in zip(told, weight, loss, strict=True):
            if own > 0:
                add_scaled(self.vector[:-2], torch.nan_to_num(row), own)
                self.weight, self.loss = self.weight + own, self.loss + own * value

    def finish(self) -> tuple[Tensor, float] | None:
        """Divide by the weights of all processes: the mean (n,) and the mean loss; None if nobody told anything."""
        if parallel.joined():
            self.vector[-2:] = self.vector.new_tensor([self.weight, self.loss])
            torch.distributed.all_reduce(self.vector)
            self.weight, self.loss = self.vector[-2:].tolist()
        if not self.weight:
            return None
        return self.vector[:-2] / self.weight, self.loss / self.weight
