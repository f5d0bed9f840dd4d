"""Distributes the remainder of a class among its holders, so that clients' sizes are even.

A holder is a client and one of its classes; holders are sorted by class. Each gets an equal share of its class, and
some get one more sample of the remainder.

Shapes: ``H`` holders, ``C`` classes, ``K`` clients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsparse.data import dealing
from fedsparse.data.checks import Ints

Marks = npt.NDArray[np.bool_]
_WORK = 100_000_000  # bound of holders visited in the search for chains, over all searches


def holders_of_one_more(clients: Ints, holders: Ints, sizes: Ints) -> Marks:
    """Choose the holders who get one more sample of their class, by few moves that make clients' sizes even.

    Initially these are the first holders of each class. Then each class is dealt again to the holders of smallest
    clients, and samples move along chains from clients with too many to those with too few. So sizes differ by at most
    one where that is possible, and nothing moves if they did initially.

    Args:
        clients: client of each holder (H,).
        holders: of each class (C,), at least one where it has samples.
        sizes: samples of each class (C,).

    Returns:
        bool (H,).

    >>> holders_of_one_more(np.array([0, 1, 0, 1]), np.array([2, 2]), np.array([3, 3])).tolist()
    [False, True, True, False]

    """
    whole, left = np.divmod(sizes, np.maximum(holders, 1))
    classes = np.repeat(np.arange(holders.size), holders)
    got = dealing.ranks(holders) < left[classes]
    total = np.bincount(clients, weights=whole[classes] + got).astype(np.int64)
    ends = np.cumsum(holders)
    runs = [slice(end - n, end) for end, n, over in zip(ends.tolist(), holders.tolist(), left.tolist()) if over]  # noqa: B905
    while sum(_deal_again(clients[run], got[run], total) for run in runs):
        pass
    for _ in range(_WORK // max(1, clients.size)):
        if np.ptp(total) < 2 or not (_hand_on(clients, got, total, runs)):
            break
    return got


def _deal_again(clients: Ints, got: Marks, total: Ints) -> bool:
    """Deal a class's remainder to its smallest clients, on ties to present holders; returns whether one moved."""
    total[clients[got]] -= 1
    now = np.zeros_like(got)
    now[np.lexsort((~got, total[clients]))[: np.count_nonzero(got)]] = True
    total[clients[now]] += 1
    moved = bool((now != got).any())
    got[:] = now
    return moved


def _hand_on(clients: Ints, got: Marks, total: Ints, runs: list[slice]) -> bool:
    """Find a shortest chain from a largest client to one smaller by two, or to a smallest, and move samples."""
    low, high = total.min(), total.max()
    for rich, poor in ((total == high, total <= high - 2), (total >= low + 2, total == low)):
        giver = np.full((2, total.size), -1)  # giving and taking holder of the chain's step to each client
        reached, open_ = rich.copy(), list(runs)
        while True:
            before = reached.copy()
            for run in list(open_):
                who, has = clients[run], got[run]
                sources, takers = np.flatnonzero(has & before[who]), np.flatnonzero(~has & ~reached[who])
                if sources.size:
                    open_.remove(run)
                    giver[:, who[takers]] = run.start + np.stack([np.full(takers.size, sources[0]), takers])
                    reached[who[takers]] = True
            found = np.flatnonzero(reached & poor)
            if found.size:
                _move(clients, got, total, giver, int(found[0]))
                return True
            if (reached == before).all():
                break
    return False


def _move(clients: Ints, got: Marks, total: Ints, giver: Ints, client: int) -> None:
    """Move one sample on each step of a chain, from its end to its beginning."""
    total[client] += 1
    while giver[0, client] >= 0:
        gives, takes = giver[:, client]
        got[gives], got[takes] = False, True
        client = int(clients[gives])
    total[client] -= 1
