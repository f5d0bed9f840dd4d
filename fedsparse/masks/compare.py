"""Masks compared: how much of what they train is the same.

Shapes: ``M`` masks, ``n`` coordinates of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedsparse.masks.mask import Mask

CHUNK = 1 << 18  # coordinates compared at once: their counts are exact in float32, and 100 masks take 100 MB


def overlaps(masks: Sequence[Mask], chunk: int = CHUNK) -> Tensor:
    r"""Compare masks pair by pair by the Jaccard index, trained in both / trained in either.

    .. math:: J_{ij} = |m_i \cap m_j| / |m_i \cup m_j|, \quad |m_i \cup m_j| = |m_i| + |m_j| - |m_i \cap m_j|

    Two masks that train nothing overlap fully: 1.

    Args:
        masks: M masks of one model; the order of their tensors does not matter.
        chunk: coordinates that are compared at once.

    Returns:
        float64 (M, M), symmetric, 1 on the diagonal.

    Raises:
        ValueError: the masks differ in the names or shapes of their tensors.

    """
    both = torch.zeros(len(masks), len(masks), dtype=torch.float64)
    for rows in _chunks(masks, chunk):
        both += rows @ rows.T
    alone = both.diagonal()
    either = alone[:, None] + alone - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _chunks(masks: Sequence[Mask], size: int) -> Iterator[Tensor]:
    """Lay the masks side by side, a piece of a tensor at a time: float32 (M, at most ``size``)."""
    for mask in masks:
        masks[0].check_same_model(mask)
    for name in masks[0].tensors if masks else ():
        pieces = zip(*(mask.tensors[name].reshape(-1).split(size) for mask in masks), strict=True)
        yield from (torch.stack(piece).float() for piece in pieces)
