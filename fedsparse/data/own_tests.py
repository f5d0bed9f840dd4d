"""Test samples that a client keeps of its own data: taken out of what it trains on, put behind the test split.

Who evaluates clients knows indices into the test split alone (``Federation.tests``). So the samples that a client keeps
are appended there, and its test part points at them; ``Dataset.own`` says how many they are, and figures of the test
split itself leave them out.

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

_OWN_TESTS = 111  # goes on where the numbers of ``fedsparse.data.splits`` end


def own_tests(
    parts: Sequence[Ints], labels: npt.ArrayLike, fraction: float, seed: int
) -> tuple[list[Ints], list[Ints]]:
    """Let every client keep a share of its samples to test on, with the class mix of its part, each by its own stream.

    Of m samples floor(fraction * m) are kept, split over the classes by the largest remainder: a client of few samples
    keeps none, and every client goes on to train on at least one.

    Args:
        parts: sorted training samples of each client, K arrays; no sample twice.
        labels: class of each training sample (n,).
        fraction: share, above 0 and below 1.
        seed: seed of the partition.

    Returns:
        What each client trains on, and what it keeps: twice K arrays of sorted indices into the training split.

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
    """Append the training samples that clients keep to the test split, client after client.

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
    """Choose which samples of one client are kept: classes (m,) -> bool (m,)."""
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
    """Refuse samples that are dealt twice: one client would train on what another tests on."""
    everything = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    if np.unique(everything).size < everything.size:
        raise ValueError(
            "data.local_test needs clients that share no samples, and this partition deals some twice; "
            "set data.local_test=null or choose another partition"
        )
