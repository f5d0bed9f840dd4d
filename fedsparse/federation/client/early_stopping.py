"""Early stopping of each client within its local training."""

from __future__ import annotations

import math
from collections.abc import Sequence

Counts = Sequence[Sequence[int]]


class Patience:
    """Stops each client after so many epochs without a lower mean loss.

    Args:
        counts: [S][K] real samples of each step.
        epochs: passes over its samples that each client would make.
        patience: epochs without a lower loss after which a client stops.

    Attributes:
        taken: [S][K] samples of the steps so far; 0 for a client that has stopped.

    >>> stop = Patience([[4], [4], [4], [4]], epochs=4, patience=2)
    >>> for loss in (1.0, 1.5, 1.2):
    ...     allowed = stop.allowed([4])
    ...     stop.update([loss])
    >>> stop.allowed([4])
    (0,)
    """

    def __init__(self, counts: Counts, epochs: int, patience: int) -> None:
        self.counts = counts
        steps = [sum(n > 0 for n in client) for client in zip(*counts, strict=True)]
        self.length = [max(1, total // epochs) for total in steps]  # steps of an epoch, by client
        self.patience = patience
        self.best, self.waited = [math.inf] * len(steps), [0] * len(steps)
        self.sums = [(0.0, 0)] * len(steps)
        self.done = [0] * len(steps)
        self.taken: list[tuple[int, ...]] = []

    def allowed(self, count: Sequence[int]) -> tuple[int, ...]:
        """Count the K clients' samples of the next step: 0 for a client that has stopped."""
        pairs = zip(count, self.waited, strict=True)
        self.taken.append(tuple(n if waited < self.patience else 0 for n, waited in pairs))
        return self.taken[-1]

    def update(self, losses: Sequence[float]) -> None:
        """Take in the K mean losses of the last step."""
        for k, (n, loss) in enumerate(zip(self.taken[-1], losses, strict=True)):
            if n:
                total, seen = self.sums[k]
                self.sums[k], self.done[k] = (total + n * loss, seen + n), self.done[k] + 1
                if self.done[k] % self.length[k] == 0:
                    self._end_epoch(k)

    def _end_epoch(self, k: int) -> None:
        total, seen = self.sums[k]
        better = total / seen < self.best[k]
        self.best[k] = min(self.best[k], total / seen)
        self.waited[k] = 0 if better else self.waited[k] + 1
        self.sums[k] = (0.0, 0)
