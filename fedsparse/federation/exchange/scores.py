"""Scores of the coordinates that a client may send, and the choice of the highest: pure functions.

Shapes: n coordinates that a client may send, in the same order on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number
from fedsparse.masks.topk import best, count, kth

Score = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 1e-9  # 0.1 * 30 is 3.0000000000000004, and its ceiling must be 3

# higher scores are sent first; of a client's values after and before training (Zhou et al. 2019, section 3)
SCORES: dict[str, Score] = {
    "largest_final": lambda theta, start: theta.abs(),
    "smallest_final": lambda theta, start: -theta.abs(),
    "largest_change": lambda theta, start: (theta - start).abs(),
    "smallest_change": lambda theta, start: -(theta - start).abs(),
    "largest_increase": lambda theta, start: theta.abs() - start.abs(),
    "smallest_increase": lambda theta, start: start.abs() - theta.abs(),
}


def score(rule: str) -> Score:
    """Look up a score by its name.

    Raises:
        ValueError: an unknown name.

    """
    check_choice("exchange.by", rule, *SCORES)
    return SCORES[rule]


def select(rule: str, theta: Tensor, start: Tensor, fraction: float) -> Tensor:
    """Mark the coordinates of each row with the highest scores: exactly floor(fraction * n + 0.5), at least one.

    Ties go to the lowest index.

    Args:
        rule: one of ``SCORES``, such as ``largest_change``.
        theta: (*, n), values after local training.
        start: (*, n), values that the clients started from.
        fraction: share to mark, above 0 and at most 1.

    Returns:
        bool (*, n).

    Raises:
        ValueError: an unknown rule or a fraction out of range.

    >>> select("largest_change", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0]), 0.34)
    tensor([False,  True, False])

    """
    scores = score(rule)(theta, start)
    k = kept(fraction, scores.shape[-1])
    rows = scores.reshape(-1, scores.shape[-1])
    return torch.stack([best(row, k, largest=True) for row in rows]).view(scores.shape)


def kept(fraction: float, n: int) -> int:
    """Round a fraction of ``n`` half up, to at least one.

    Raises:
        ValueError: a fraction that is not above 0 and at most 1.

    """
    check_number("exchange.fraction", fraction, above=0, most=1)
    return min(n, max(1, count(fraction, n)))


def at_least(scores: Tensor, fraction: float) -> Tensor:
    """Mark the ceil(fraction * n) highest of n scores and all ties with the lowest of these: bool (n,).

    >>> at_least(torch.tensor([1.0, 2.0, 2.0, 3.0]), 0.5)
    tensor([False,  True,  True,  True])
    """
    k = max(1, math.ceil(len(scores) * fraction - TOLERANCE))
    return scores >= kth(scores.clone(), len(scores) - k + 1)
