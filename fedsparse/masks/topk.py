"""Exactly k of n scores: the k-th best by narrowing in on it, then a running count that shares out its ties.

Nothing is sorted and the scores are never copied: 22 million in float64 (174 MB) take 0.4 to 1.2 s on one CPU core, and
at most 90 MB beside them, the marks included.

Shapes: ``n`` scores, ``*`` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 18  # scores drawn to guess where the k-th stands; up to four times as many are searched without a guess
MARGIN = 0.01  # share of the scores by which a guess may be wrong; if it is more, all scores are searched


def count(fraction: float, n: int) -> int:
    """Round a fraction of ``n`` half up: floor(fraction * n + 0.5).

    >>> count(0.5, 5)
    3
    """
    return math.floor(fraction * n + 0.5)


def top_fraction(scores: Tensor, fraction: float, *, largest: bool = True) -> Tensor:
    """Mark exactly k = floor(fraction * n + 0.5) of the last dimension's n scores, row by row.

    Ties go to the lowest index.

    Args:
        scores: (*, n), floating point, infinities allowed.
        fraction: share to mark, in [0, 1].
        largest: whether the largest scores are marked, or the smallest.

    Returns:
        bool (*, n), k of every row True.

    Raises:
        ValueError: a fraction outside [0, 1], scores without a dimension, or NaN among the scores.

    >>> top_fraction(torch.tensor([1.0, 3.0, 2.0, 3.0]), 0.25)
    tensor([False,  True, False, False])

    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of scores to mark must lie in [0, 1], not {fraction!r}")
    check(scores)
    k = count(fraction, scores.shape[-1])
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    rows = scores.detach().reshape(-1, scores.shape[-1])
    return torch.stack([best(row, k, largest=largest) for row in rows]).view(scores.shape)


def check(scores: Tensor) -> None:
    """Refuse scores that have no order.

    Raises:
        ValueError: NaN among them, or no dimension.

    """
    if scores.dim() == 0:
        raise ValueError("scores need at least one dimension")
    if scores.isnan().any():
        raise ValueError("the scores hold NaN, which has no order; look for a loss or a weight that is not finite")


def best(scores: Tensor, k: int, *, largest: bool) -> Tensor:
    """Mark the k best of one tensor's scores, ties to the first; the host does not wait for their device.

    Args:
        scores: (n,), NaN-free.
        k: how many to mark, from 0 to n.
        largest: whether the largest scores are the best, or the smallest.

    Returns:
        bool (n,), k of them True.

    """
    n = len(scores)
    if scores.device.type == "cpu" or k in (0, n):
        return mark([scores], k, largest=largest)[0][0]
    edge = kth(scores, n - k + 1 if largest else k)
    sure, tied = scores > edge if largest else scores < edge, scores == edge
    return sure | tied & (tied.cumsum(0, dtype=torch.int32) <= k - sure.sum())


def mark(parts: Sequence[Tensor], k: int, *, largest: bool) -> tuple[list[Tensor], int]:
    """Mark the k best scores of several tensors taken together, ties to the first of them.

    Args:
        parts: flat scores, counted together; n in all, NaN-free.
        k: how many to mark, from 0 to n.
        largest: whether the largest scores are the best, or the smallest.

    Returns:
        Flat bool tensors like ``parts``, and the number of scores that tie where the line falls between marked and not
        marked: 0 if it falls between two different scores.

    """
    n = sum(part.numel() for part in parts)
    if k in (0, n):
        return [torch.full_like(part, k > 0, dtype=torch.bool) for part in parts], 0
    edge = smallest(parts, n - k + 1 if largest else k)
    marks = [part > edge if largest else part < edge for part in parts]
    tied = [part == edge for part in parts]
    ties = [int(at.count_nonzero()) for at in tied]
    left = k - sum(int(sure.count_nonzero()) for sure in marks)
    cut = sum(ties) if left < sum(ties) else 0
    for sure, at, found in zip(marks, tied, ties, strict=True):
        sure |= at if found <= left else at & (at.cumsum(0, dtype=torch.int32) <= left)
        left = max(0, left - found)
    return marks, cut


def smallest(parts: Sequence[Tensor], k: int, sample: int = SAMPLE, margin: float = MARGIN) -> Tensor:
    """Find the k-th smallest score of several flat tensors: a scalar, exact whatever the sample says.

    Args:
        parts: flat scores, counted together; NaN-free.
        k: from 1 to how many there are.
        sample: scores drawn to guess where the k-th stands.
        margin: share of the scores by which the guess may be wrong.

    """
    if (n := sum(part.numel() for part in parts)) > 4 * sample:
        low, high = _bracket(parts, k / n, n, sample, margin)
        for edge in (low, high):
            if _number(parts, torch.lt, edge) < k <= _number(parts, torch.le, edge):
                return edge
        if (below := _number(parts, torch.le, low)) < k <= _number(parts, torch.lt, high):
            return kth(torch.cat([part[(part > low) & (part < high)] for part in parts]), k - below)
    return kth(torch.cat(list(parts)), k)


def kth(scores: Tensor, k: int) -> Tensor:
    """Find the k-th smallest of flat scores, a scalar where they are; on a CPU they lose their order: pass a copy.

    numpy needs no indices for it. A GPU's ``topk`` shares a row out among many blocks; its ``kthvalue`` has one block
    for it, and is refused where kernels are to be deterministic.
    """
    if scores.device.type != "cpu":
        few = k <= len(scores) // 2
        ends = scores.topk(k if few else len(scores) - k + 1, largest=not few, sorted=False).values
        return ends.amax() if few else ends.amin()
    if scores.dtype not in (torch.float32, torch.float64):
        return scores.kthvalue(k).values
    scores.numpy().partition(k - 1)
    return scores[k - 1].clone()


def _bracket(parts: Sequence[Tensor], place: float, n: int, sample: int, margin: float) -> tuple[Tensor, Tensor]:
    """Guess two scores around the one at a place (0 to 1) of the order, from a sample drawn with a fixed seed."""
    draws = torch.Generator().manual_seed(0)
    sizes = [(part, len(part) * sample // n) for part in parts if len(part)]
    drawn = [part[torch.randint(len(part), (size,), generator=draws).to(part.device)] for part, size in sizes]
    ordered = torch.cat(drawn).sort().values
    last = len(ordered) - 1
    low, high = (min(max(round((place + by) * last), 0), last) for by in (-margin, margin))
    return ordered[low], ordered[high]


def _number(parts: Sequence[Tensor], compare: Callable[[Tensor, Tensor], Tensor], edge: Tensor) -> int:
    return sum(int(compare(part, edge).count_nonzero()) for part in parts)
