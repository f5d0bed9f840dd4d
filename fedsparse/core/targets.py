"""Losses and hits of samples with one target each, a class, or with a sequence of them.

Shapes: B samples, L places of a sequence, C outputs: classes, or words of a vocabulary.

A place without a target has ``IGNORED``, as in Hugging Face's models and torch's ``cross_entropy``. Logits and targets
stand at the same places: who builds the data shifts a text by one, and no model does.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100

Weigh = Callable[[Tensor], Tensor]  # targets (B,) or (B, L) -> weights of the samples (B,), not normalised


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Compute the loss of every sample; of a sequence the mean over its targets, 0 without any.

    Args:
        logits: (B, C), or (B, L, C).
        y: int64 (B,), or (B, L) with ``IGNORED`` where there is no target.

    Returns:
        (B,).

    >>> import torch
    >>> cross_entropy(torch.zeros(1, 3, 2), torch.tensor([[0, IGNORED, 1]]))
    tensor([0.6931])
    """
    if y.ndim == 1:
        return F.cross_entropy(logits, y, reduction="none")
    of_places = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=IGNORED)
    sums: Tensor = of_places.view(y.shape).sum(1)
    return sums / count(y).clamp(min=1)


def count(y: Tensor) -> Tensor:
    """Count the targets of every sample: (B,) or (B, L) -> int64 (B,); a class is one."""
    return (y != IGNORED).long() if y.ndim == 1 else (y != IGNORED).sum(1)


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """Mark the samples whose targets all have the largest logit: (B, C), (B,) or (B, L, C), (B, L) -> bool (B,).

    Of a sequence this is exact match, and what greedy decoding gives: while each word so far is the target, the next
    one is decoded from the very inputs that stand here; and after the first miss the answer is another one anyway.
    """
    found = logits.argmax(-1)
    return found == y if y.ndim == 1 else ((found == y) | (y == IGNORED)).all(1)
