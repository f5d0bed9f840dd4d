"""Clients' own test samples: taken from their training samples, and appended to the test split.

The evaluation of clients takes indices into the test split. So the samples are appended there, and a client's test part
indexes them; ``Dataset.own`` counts them, and figures of the test split exclude them.

Shapes: ``n`` training samples, ``K`` clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsparse.core.checks import finite
from fedsparse.data import checks, dealing
from fedsparse.data.checks import Ints
from fedsparse.data.datasets import Dataset, Split

_OWN_TESTS = 111  # the next stream key after those of ``fedsparse.data.splits``


def own_tests(
    parts: Sequence[Ints], labels: npt.ArrayLike, fraction: float, seed: int
) -> tuple[list[Ints], list[Ints]]:
    """Draw test samples from every client's training samples, with the class proportions of its part.

    Of m samples floor(fraction * m) are drawn, by a stream keyed by the client, split over classes by the largest
    remainder. A client with few samples has no test samples; each client trains on at least one.

    Args:
        parts: sorted training samples of each client, K arrays; no sample twice.
        labels: class of each training sample (n,).
        fraction: share, above 0 and below 1.
        seed: seed of the partition.

    Returns:
        Training samples and test samples of each client: twice K arrays of sorted indices into the training split.

    Raises:
        ValueError: the fraction is out of range, or clients share samples.

    >>> train, kept = own_tests([np.arange(10)], [0] * 5 + [1] * 5, 0.4, seed=0)
    >>> len(train[0]), [int((kept[0] < 5).sum()), int((kept[0] >= 5).sum())]
    (6, [2, 2])

    """
    array, share = checks.checked_labels(labels), _checked_fraction(fraction)
    _refuse_shared(parts)
    chosen = [_kept(array[part], share, dealing.stream(seed, _OWN_TESTS, client)) for client, part in enumerate(parts)]
    pairs = list(zip(parts, chosen, strict=True))
    return [part[~kept] for part, kept in pairs], [part[kept] for part, kept in pairs]


def with_own_tests(dataset: Dataset, kept: Sequence[Ints]) -> tuple[Dataset, list[Ints]]:
    """Append the clients' own test samples to the test split, client after client.

    Args:
        dataset: the splits; images in memory.
        kept: indices into the training split, K arrays.

    Returns:
        The data set with the longer test split, and each client's indices into it.

    Raises:
        ValueError: the images stay on the disk.

    """
    train, test = dataset.train, dataset.test
    if not (isinstance(train.x, Tensor) and isinstance(test.x, Tensor)):
        raise ValueError("data.local_test needs the samples in memory; set data.stream=false or data.local_test=null")
    rows = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *kept]))
    users = None if train.users is None or test.users is None else np.concatenate([test.users, train.users[rows]])
    longer = Split(torch.cat([test.x, train.x[rows]]), torch.cat([test.y, train.y[rows]]), users)
    ends = len(test.y) + np.cumsum([len(part) for part in kept])
    places = [np.arange(end - len(part), end) for end, part in zip(ends.tolist(), kept, strict=True)]
    return replace(dataset, test=longer, own=len(rows)), places


def _kept(labels: Ints, share: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw the test samples of one client: classes (m,) -> bool (m,)."""
    kept = np.zeros(labels.size, dtype=bool)
    size = int(share * labels.size + 1e-9)  # nudged: 0.29 * 100 is 28.999999999999996 in floats
    if size:
        coded = np.unique(labels, return_inverse=True)[1]
        counts = np.bincount(coded)
        wanted = dealing.largest_remainder(counts[None].astype(np.float64), np.array([size]))[0]
        kept[dealing.grouped(coded, rng)[dealing.ranks(counts) < np.repeat(wanted, counts)]] = True
    return kept


def _checked_fraction(fraction: Any) -> float:
    if not (finite(fraction) and 0 < fraction < 1):
        raise ValueError(f"data.local_test is {fraction!r}; give a share above 0 and below 1, or null")
    return float(fraction)


def _refuse_shared(parts: Sequence[Ints]) -> None:
    """Refuse shared samples, on which one client would train and another test."""
    everything = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    if np.unique(everything).size < everything.size:
        raise ValueError(
            "data.local_test needs clients that share no samples, and this partition deals some twice; "
            "set data.local_test=null or choose another partition"
        )
