"""Roundings, draws and shuffles that the partitions share.

Pure functions of numpy arrays; no Python loop runs over samples. A partition is one ``owner`` array, the client of each
sample, and split into parts at the end: a million clients then cost a sort, not a million appends.

Shapes: ``n`` samples, ``K`` clients, ``C`` classes, ``R`` rows of a chunk of clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedsparse.data import checks
from fedsparse.data.checks import Floats, Ints

NOBODY = -1  # the owner of a sample that no client holds
CELLS = 1_000_000  # clients x classes of a chunk, so that memory does not grow with the federation
_TINY = 1e-300  # the smallest Dirichlet parameter whose logarithms stay finite


def stream(seed: int, key: int, *ids: int) -> np.random.Generator:
    """Build the generator of one partition; its ``key`` is a constant above every ``Purpose``.

    ``ids``, such as a client's, key separate streams; a partition always gives the same number of them.
    """
    return np.random.default_rng([checks.checked_integer("seed", seed, 0), key, *ids])


def chunks(clients: int, classes: int, cells: int = CELLS) -> Iterator[slice]:
    """Split the clients into slices of at most ``cells`` clients x classes."""
    step = max(1, cells // classes)
    return (slice(start, min(start + step, clients)) for start in range(0, clients, step))


def starts_of(sizes: Ints) -> Ints:
    """Compute the offsets of concatenated runs from their sizes: (G,) -> (G,).

    >>> starts_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2]
    """
    return np.cumsum(sizes) - sizes


def ranks(sizes: Ints) -> Ints:
    """Number the members of concatenated runs, each run from 0: (G,) -> (sum of sizes,).

    >>> ranks(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(sizes.sum()) - np.repeat(starts_of(sizes), sizes)


def grouped(groups: Ints, rng: np.random.Generator) -> Ints:
    """List the positions of group 0, then of group 1 and so on, each in random order: (n,) -> (n,)."""
    shuffled = rng.permutation(groups.size)
    return shuffled[np.argsort(groups[shuffled], kind="stable")]


def parts_of(owner: Ints, num_clients: int) -> list[Ints]:
    """Split a partition into the sorted sample indices of every client, without the samples of ``NOBODY``.

    >>> [part.tolist() for part in parts_of(np.array([1, 0, NOBODY, 1]), 2)]
    [[1], [0, 3]]
    """
    order = np.argsort(owner, kind="stable")[np.count_nonzero(owner == NOBODY) :]
    ends = np.cumsum(np.bincount(owner[owner != NOBODY], minlength=num_clients)).tolist()
    return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def largest_remainder(weights: Floats, totals: Ints) -> Ints:
    """Split each total in proportion to its row of weights, by the largest remainder; ties go to the lowest class.

    Args:
        weights: (R, C), non-negative, each row with a positive sum.
        totals: (R,), what each row is to sum to.

    Returns:
        Whole numbers (R, C), each within one of its exact share.

    >>> largest_remainder(np.array([[1.0, 1.0, 2.0]]), np.array([6])).tolist()
    [[2, 1, 3]]
    >>> largest_remainder(np.array([[1.0, 28.0, 40.0]]), np.array([23])).tolist()  # thirds are left of each
    [[1, 9, 13]]

    """
    exact = totals[:, None] * weights / weights.sum(axis=1, keepdims=True)
    whole: Ints = np.floor(exact).astype(np.int64)
    # rounded, so that remainders that are equal but for the last bits of a division count as a tie
    remainder = np.where(weights > 0, np.round(exact - whole, 9), -1.0)
    place = np.argsort(np.argsort(-remainder, axis=1, kind="stable"), axis=1, kind="stable")
    whole += place < (totals - whole.sum(axis=1))[:, None]
    return whole


def capped_split(weights: Floats, totals: Ints, room: Ints) -> Ints:
    """Split totals by the largest remainder, with at most ``room[c]`` of class c; the rest goes to other classes.

    Args:
        weights: (R, C), non-negative; a row of zeros gets nothing.
        totals: (R,); a row gets less where its classes have no more room.
        room: (C,), the most that any one row may take of a class.

    Returns:
        Whole numbers (R, C).

    """
    counts = np.zeros(weights.shape, dtype=np.int64)
    while True:
        open_ = np.where(counts < room, weights, 0.0)
        missing = totals - counts.sum(axis=1)
        rows = np.flatnonzero((missing > 0) & (open_.max(axis=1) > 0))
        if not rows.size:
            return counts
        counts[rows] = np.minimum(counts[rows] + largest_remainder(open_[rows], missing[rows]), room)


def dirichlet_logs(alpha: Floats, size: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Draw unnormalised logarithms of Dirichlet variables: ``softmax`` of them over the last dimension is Dir(alpha).

    For alpha of 1e-3 every Gamma variable underflows to 0 and the usual quotient is NaN. So each is drawn as a
    logarithm: if G ~ Gamma(alpha + 1) and E ~ Exp(1), then log G - E / alpha is the logarithm of a Gamma(alpha)
    variable (Marsaglia and Tsang 2000, section 6).
    """
    safe = np.maximum(alpha, _TINY)
    return np.log(rng.standard_gamma(safe + 1, size)) - rng.standard_exponential(size) / safe


def softmax(logs: Floats) -> Floats:
    """Normalise logarithms over the last dimension; -inf becomes 0, and at least one must be finite."""
    shares = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True), dtype=np.float64)


def rounded_shares(shares: Floats, total: int, rng: np.random.Generator) -> Ints:
    """Split ``total`` by shares (K,) into whole numbers, each within one of its exact share and unbiased.

    Systematic resampling: the cumulative shares are cut with a random offset. Without one, the clients that round up
    would be the same for every class.
    """
    ends = np.cumsum(shares)
    cuts = np.floor(ends / ends[-1] * total + rng.random()).astype(np.int64)
    cuts[-1] = total
    counts: Ints = np.diff(np.minimum(cuts, total), prepend=0)
    return counts


def deal_classes(num_clients: int, num_classes: int, nc: int, rng: np.random.Generator) -> Ints:
    """Choose ``nc`` distinct classes for every client, each class for floor or ceil of K * nc / C clients: (K, nc).

    Like cards: shuffled decks of all classes are dealt one after the other, ``nc`` cards a client. A client who stands
    on the seam of two decks must not get a class twice, so the second deck's top cards avoid those already held. The
    seams repeat every lcm(C, nc) cards; such blocks are independent, and are dealt side by side.
    """
    cards, block = num_clients * nc, math.lcm(num_classes, nc)
    shape = (-(-cards // block), num_classes)
    dealt: list[Ints] = []
    for start in range(0, min(block, cards), num_classes):
        held = start % nc
        keys = rng.random(shape)
        if held:
            np.put_along_axis(keys, dealt[-1][:, -held:], 2.0, axis=1)
        deck, top = np.argsort(keys, axis=1), nc - held if held else 0
        dealt.append(np.concatenate([deck[:, :top], rng.permuted(deck[:, top:], axis=1)], axis=1))
    return np.concatenate(dealt, axis=1).reshape(-1)[:cards].reshape(num_clients, nc)


def draw_mixes(logs: Floats, wanted: Ints, left: Ints, rng: np.random.Generator) -> Ints:
    """Draw class counts of clients in turn, without replacement.

    A client draws its samples' classes from its own mix; once a class is empty, the mix is renormalised over the other
    classes (Hsu et al. 2019). All clients up to the first that empties a class are drawn in one call; that client draws
    its missing samples again. So there are at most C + 1 calls, for any number of clients.

    Args:
        logs: (R, C), logarithms of each client's mix, not normalised.
        wanted: (R,), samples of each client; their sum is at most that of ``left``.
        left: (C,), remaining samples of each class; reduced in place.
        rng: source of random numbers.

    Returns:
        Counts (R, C), whose rows sum to ``wanted``.

    """
    counts, wanted, start = np.zeros(logs.shape, dtype=np.int64), wanted.copy(), 0
    while start < len(wanted):
        drawn = rng.multinomial(wanted[start:], softmax(np.where(left > 0, logs[start:], -np.inf)))
        served = int((drawn.cumsum(axis=0) <= left).all(axis=1).sum())
        counts[start : start + served] += drawn[:served]
        left -= drawn[:served].sum(axis=0)
        start += served
        if start < len(wanted):
            got = np.minimum(drawn[served], left)
            counts[start] += got
            left -= got
            wanted[start] -= got.sum()
    return counts


def fill_small(owner: Ints, num_clients: int, min_size: int, rng: np.random.Generator) -> Ints:
    """Fill the clients below ``min_size`` with random samples of the largest clients: owners (n,) -> owners (n,).

    The largest clients are reduced to one common level, the highest that frees enough samples, so that no giver ends
    below another client. Needs ``num_clients * min_size <= n``.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    short = np.maximum(min_size - sizes, 0)
    if not short.any():
        return owner
    given = _levelled(sizes, int(short.sum()), min_size, rng)
    order = grouped(owner, rng)
    moved = order[ranks(sizes) < np.repeat(given, sizes)]
    filled = owner.copy()
    filled[rng.permutation(moved)] = np.repeat(np.arange(num_clients), short)
    return filled


def _levelled(sizes: Ints, needed: int, floor: int, rng: np.random.Generator) -> Ints:
    """Choose how many samples each client gives, ``needed`` in all, by the highest common level, at least ``floor``."""
    low, high = floor, int(sizes.max())
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= needed else (low, level - 1)
    given = np.maximum(sizes - low, 0)
    spared = rng.permutation(np.flatnonzero(given))[: given.sum() - needed]
    given[spared] -= 1
    return given


def class_counts(parts: Sequence[Ints], labels: Ints, classes: int, group: int = 1) -> Floats:
    """Count the classes of each part, or of each ``group`` of neighbouring parts together: (ceil(K / group), C).

    >>> class_counts([np.array([0]), np.array([1, 2])], np.array([0, 1, 1]), classes=2).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    rows = -(-len(parts) // group)
    part_labels = labels[np.concatenate(parts).astype(np.int64)]
    cells = np.repeat(np.arange(len(parts)) // group * classes, sizes) + part_labels
    return np.bincount(cells, minlength=rows * classes).reshape(rows, classes).astype(np.float64)


def deal_in_turn(counts: Ints, used: Ints, pool: Ints, room: Ints) -> list[Ints]:
    """Deal counts (R, C) from the pools of the classes; a pool restarts when it is used up.

    Args:
        counts: samples of each class that each client gets, at most the class's room.
        used: (C,), samples of each class dealt before.
        pool: (n,), the samples of class 0, then of class 1 and so on.
        room: (C,), the size of each class.

    Returns:
        R arrays of sorted samples.

    """
    first = used + counts.cumsum(axis=0) - counts
    row, column = np.nonzero(counts)
    count = counts[row, column]
    turn = np.repeat(first[row, column], count) + ranks(count)
    column = np.repeat(column, count)
    samples = pool[starts_of(room)[column] + turn % room[column]]
    ends = np.cumsum(counts.sum(axis=1))[:-1]
    order = np.lexsort((samples, np.repeat(row, count)))
    return np.split(samples[order], ends)
