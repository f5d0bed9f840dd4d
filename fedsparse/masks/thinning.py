"""Masks thinned out in rounds: the worst of what is left are given up, and never return.

Shapes: ``P`` coordinates of the space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity


def shrunk(row: Tensor, left: Tensor | None, factor: float) -> Tensor:
    """Multiply the values that are given up by a factor: (P,), the values that the next round scores.

    >>> shrunk(torch.tensor([2.0, 4.0]), torch.tensor([True, False]), 0.5)
    tensor([2., 2.])
    """
    return row if left is None else torch.where(left, row, factor * row)


def thin(
    scores: Tensor, left: Tensor | None, space: ParamSpace, sparsity: Sparsity, *, largest: bool, power: float
) -> Tensor:
    """Give up the worst of what is left, down to density^power.

    Args:
        scores: float64 (P,), of this round; those of what was given up are overwritten.
        left: bool (P,), what the rounds before left; None before the first.
        space: names and shapes of the coordinates.
        sparsity: how many are left in the end; what is in ``always_train`` is never given up.
        largest: whether the largest scores are the best, or the smallest.
        power: from 0 to 1 in the last round.

    Returns:
        bool (P,), what is left now.

    Raises:
        ValueError: scores that allow no choice (``select``).

    """
    if left is not None:
        scores.masked_fill_(~left, -math.inf if largest else math.inf)
    chosen = select(scores, space, sparsity, largest=largest, power=power)
    return chosen if left is None else chosen & left


def ordered(order: Tensor, before: Tensor | None, left: Tensor, scores: Tensor, round: int) -> Tensor:
    """Extend the order in which coordinates are given up by a round: whole numbers count the rounds survived.

    Fractions are ranks by score within a round. So the masks of all ratios up to the last lie within each other.

    Args:
        order: (P,), of the rounds before; zeros before the first.
        before: bool (P,), what was left before the round; None: everything.
        left: bool (P,), what is left after it.
        scores: (P,), of this round.
        round: its number, from 0.

    Returns:
        (P,): the later the round, and within one the larger the score, the higher.

    >>> ordered(torch.zeros(3), None, torch.tensor([False, True, False]), torch.tensor([2.0, 9.0, 1.0]), 0)
    tensor([0.5000, 1.0000, 0.0000])

    """
    lost = ~left if before is None else before & ~left
    ranked = order.clone()
    for those, survived in ((lost, round), (left, round + 1)):
        rank = torch.empty(int(those.sum()), dtype=order.dtype, device=order.device)
        rank[scores[those].argsort(stable=True)] = torch.arange(len(rank), dtype=order.dtype, device=order.device)
        ranked[those] = survived + rank / max(1, len(rank))
    return ranked


def exchanged(size: int, left: Tensor | None) -> tuple[int, int]:
    """Count what one client's message of a round holds: scores going up, and bytes of a bitmap coming down.

    Scores of what is left go up; from the second round, a bitmap of what is left (P,) comes down.

    >>> exchanged(9, None), exchanged(9, torch.arange(9) < 4)
    ((9, 0), (4, 2))
    """
    return (size, 0) if left is None else (int(left.count_nonzero()), -(-size // 8))
