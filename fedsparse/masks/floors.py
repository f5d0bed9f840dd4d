"""No dead layers: every tensor keeps a share of its coordinates, and the lowest-scored elsewhere pay for it.

Shapes: ``k`` coordinates kept of a pool, ``U`` output units of all its layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsparse.masks.sparsity import as_typed
from fedsparse.masks.topk import mark


def floor_of(least: float, n: int) -> int:
    """Round a share of ``n`` up, the share taken as typed: ceil(0.1 * 30) is 3, which in binary it is not.

    >>> floor_of(0.1, 30), floor_of(0.1, 31), floor_of(0.01, 2)
    (3, 4, 1)
    """
    return math.ceil(as_typed(least) * n)


def mark_at_least(parts: Sequence[Tensor], k: int, least: float, *, largest: bool) -> tuple[list[Tensor], int]:
    """Mark the k best scores of several tensors among those choices that leave each tensor its share.

    A tensor that would fall short gets its best ones up to the share and leaves the contest; the others compete for
    what is left. A higher line can leave further tensors short, so this is repeated until none is.

    Args:
        parts: flat scores, NaN-free.
        k: how many to mark in all.
        least: share of its scores that every tensor keeps, rounded up.
        largest: whether the largest scores are the best, or the smallest.

    Returns:
        Flat bool tensors like ``parts``, and the number of scores that tie at the line among those that competed.

    Raises:
        ValueError: the shares are more than k together.

    >>> weak, strong = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 4.0, 3.0, 2.0])
    >>> mark_at_least([weak, strong], 3, 0.5, largest=True)[0]
    [tensor([False,  True]), tensor([False,  True,  True, False])]

    """
    floors = [floor_of(least, part.numel()) for part in parts]
    check_floors(sum(floors), k, least)
    short: set[int] = set()
    while True:
        free = [i for i in range(len(parts)) if i not in short]
        marks, tied = mark([parts[i] for i in free], k - sum(floors[i] for i in short), largest=largest)
        found = dict(zip(free, marks, strict=True))
        further = {i for i in free if int(found[i].count_nonzero()) < floors[i]}
        if not further:
            break
        short |= further
    found |= {i: mark([parts[i]], floors[i], largest=largest)[0][0] for i in short}
    return [found[i] for i in range(len(parts))], tied


def best_units(means: Sequence[Tensor], size: Tensor, k: int, least: float, *, largest: bool) -> Tensor:
    """Mark the best units of every layer, as many as its share; none without one.

    Args:
        means: mean scores of each layer's units.
        size: coordinates of every unit (U,).
        k: how many coordinates are kept in all.
        least: share of its units that every layer keeps, rounded up.
        largest: whether the largest scores are the best, or the smallest.

    Returns:
        bool (U,).

    Raises:
        ValueError: these units have more than k coordinates together.

    """
    marks = [mark([mean], floor_of(least, len(mean)), largest=largest)[0][0] for mean in means]
    first = torch.cat(marks)
    check_floors(int(size[first].sum()), k, least)
    return first


def check_floors(asked: int, k: int, least: float) -> None:
    """Refuse shares that together are more than may be kept.

    Raises:
        ValueError: the shares ask for more than k coordinates.

    """
    if asked > k:
        text = f"sparsity.min_density={least!r} keeps {asked} coordinates, each tensor's share rounded up to whole ones"
        raise ValueError(f"{text}, and only {k} are to be kept in all; lower it, or sparsity.ratio")
