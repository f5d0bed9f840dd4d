"""How evenly the classes lie with a client: its class shares, and the Gini index of its class counts.

Shapes: ``K`` clients, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsparse.data.checks import Floats, Ints
from fedsparse.data.dealing import class_counts


def gini(counts: Any) -> Any:
    r"""Compute the Gini index of counts along the last axis: (*, C) -> (*,).

    .. math:: \frac{\sum_{i<j} |x_i - x_j|}{n^2 \, \operatorname{mean}(x)},

    0 for equal counts and 1 - 1/C for one class alone, as in Fedland. It is NaN where all counts are 0.

    >>> float(gini([1, 2, 3, 4])), float(gini([10, 0, 0, 0]))
    (0.25, 0.75)
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64), axis=-1)
    n = ordered.shape[-1]
    # the k-th smallest is the larger one of k pairs, and the smaller one of n - 1 - k
    differences = ordered @ (2.0 * np.arange(n) - (n - 1))
    with np.errstate(invalid="ignore"):
        return differences / (n * ordered.sum(-1))


@dataclass(frozen=True)
class Balance:
    """Samples of every class that each client holds for training.

    Attributes:
        counts: (K, C).

    """

    counts: Floats

    @classmethod
    def of(cls, parts: Sequence[Ints], labels: Ints, classes: int) -> Balance:
        """Count the classes of the clients' parts.

        Args:
            parts: sample indices of every client.
            labels: class of each sample.
            classes: C.

        """
        return cls(class_counts(parts, labels, classes))

    @property
    def columns(self) -> list[str]:
        """Names of a client's columns in a table: ``gini``, and ``share_<class>`` of each class."""
        return ["gini", *(f"share_{c}" for c in range(self.counts.shape[1]))]

    def cells(self, client: int) -> list[str]:
        """Format a client's columns; they are empty for a client without samples."""
        counts = self.counts[client]
        if not counts.any():
            return [""] * (1 + len(counts))
        return [f"{value:.7g}" for value in (gini(counts), *(counts / counts.sum()))]
