"""Clients of different ranks in rows of one size: a client of rank r trains the first r rows of A and columns of B.

All other columns of its B stay 0, as they begin, so that its update has rank r (HetLoRA, Cho et al. 2024, pads so).
One network holds all clients, so that one scale is that of all: alpha / the largest rank, as where alpha grows with the
rank (FLoRA's own runs, Wang et al. 2024, have alpha = 2 r).

Shapes: P coordinates of the space; A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.models.lora import Adapter


def checked_ranks(ranks: Any) -> tuple[int, ...]:
    """Check a list of ranks.

    Raises:
        ValueError: it is no list of whole numbers from 1.

    """
    if not isinstance(ranks, Sequence) or isinstance(ranks, str) or not ranks:
        raise ValueError(f"lora.ranks is {ranks!r}; it must be null or a list of ranks, such as [8,4,4]")
    for rank in ranks:
        check_whole("lora.ranks", rank, 1)
    return tuple(ranks)


def ranks_of_clients(ranks: Sequence[int], members: Sequence[int], named: bool) -> tuple[int, ...]:
    """Give every client the rank of its department; empty if all have one rank.

    Args:
        ranks: of each department.
        members: department of each client, from 0.
        named: whether there are departments; if not, each client is one.

    Raises:
        ValueError: another number of ranks than of departments.

    """
    departments = max(members) + 1
    if len(ranks) != departments:
        what = "departments" if named else "clients, as there are no departments"
        raise ValueError(f"lora.ranks lists {len(ranks)} ranks, and there are {departments} {what}")
    return tuple(ranks[department] for department in members) if len(set(ranks)) > 1 else ()


def rank_masks(adapters: Mapping[str, Adapter], space: ParamSpace, ranks: Sequence[int]) -> Tensor:
    """Mark what trains at each rank: bool (len(ranks), P), False in the rows of A and columns of B beyond it."""
    marks = torch.ones(len(ranks), space.size, dtype=torch.bool)
    for row, rank in zip(marks, ranks, strict=True):
        tensors = space.unflatten(row)
        for adapter in adapters.values():
            if adapter.down in tensors:
                tensors[adapter.down][rank:] = False
            if adapter.up in tensors:
                tensors[adapter.up][:, rank:] = False
    return marks
