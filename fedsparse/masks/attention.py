"""Attention heads as units of a mask: the rows of a head's queries, keys and values train, or are pruned, together.

Shapes: ``P`` coordinates of the space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fedsparse.core.space import ParamSpace, Patterns, matches
from fedsparse.models.attention import Attention


def mean_by_head(scores: Tensor, space: ParamSpace, attentions: Sequence[Attention], apart: Patterns = ()) -> Tensor:
    """Give every coordinate of a head the head's mean score: scores (P,) -> (P,).

    A choice of whole output units then takes a head's units one after the other; it may still end amid one:
    ``whole_heads``.

    Args:
        scores: (P,), of any floating type.
        space: names and shapes of the coordinates.
        attentions: the layers, of ``fedsparse.models.attention.attentions``.
        apart: glob patterns of tensors that do not belong to the heads' units.

    Returns:
        float64 (P,).

    """
    pooled = scores.detach().double().clone()
    for parts in _heads(pooled, space, attentions, apart):
        mean = sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts)
        for part in parts:
            part.fill_(mean)
    return pooled


def whole_heads(mask: Tensor, space: ParamSpace, attentions: Sequence[Attention], apart: Patterns = ()) -> Tensor:
    """Drop every head of which not all coordinates are True: bool (P,) -> (P,), with as many True at most."""
    whole = mask.clone()
    for parts in _heads(whole, space, attentions, apart):
        if not all(bool(part.all()) for part in parts):
            for part in parts:
                part.fill_(False)
    return whole


def _heads(row: Tensor, space: ParamSpace, attentions: Sequence[Attention], apart: Patterns) -> Iterator[list[Tensor]]:
    """View the coordinates of head after head in a row (P,); of tensors that are in the space, and not apart."""
    named = {name: part for name, part in space.unflatten(row).items() if not matches(name, apart)}
    for attention in attentions:
        for head in range(attention.heads):
            places = [(f"{layer}.{leaf}", rows) for layer, rows in attention.rows(head) for leaf in ("weight", "bias")]
            if parts := [named[name][rows] for name, rows in places if name in named]:
                yield parts
