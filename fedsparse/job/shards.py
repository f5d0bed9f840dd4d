"""Partitions training and test samples over the clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedsparse.data.checks import NO_CLASS
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.own_tests import own_tests, with_own_tests
from fedsparse.data.partition import client_tests
from fedsparse.data.splits import user_tests


def deal_shards(
    dataset: Dataset,
    deal: Callable[..., Any],
    num_clients: int,
    seed: int,
    *,
    users: bool = False,
    test: bool = False,
    local_test: float | None = None,
) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """Partition training and test samples over the clients.

    Args:
        dataset: the splits.
        deal: the partition: (labels, num_clients, seed) -> sample indices of every client.
        num_clients: number of clients.
        seed: the run's seed.
        users: whether ``deal`` also takes the users of the samples.
        test: whether ``deal`` partitions the test split too; else a client's part follows its class proportions.
        local_test: share of its training samples that each client tests on instead; None: the test split is used.

    Returns:
        The splits, with the clients' own test samples appended; training parts; test parts.

    """
    user_ids = {"users": dataset.train.users} if users else {}
    parts = deal(labels=_classes(dataset.train), num_clients=num_clients, seed=seed, **user_ids)
    if local_test is not None:
        parts, kept = own_tests(parts, dataset.train.labels, local_test, seed)
        longer, tests = with_own_tests(dataset, kept)
        return longer, parts, tests
    if users and dataset.train.users is not None and dataset.test.users is not None:
        return dataset, parts, user_tests(dataset.train.users, dataset.test.users)
    if test:
        return dataset, parts, list(deal(labels=_classes(dataset.test), num_clients=num_clients, seed=seed, test=True))
    return dataset, parts, client_tests(parts, dataset.train.labels, dataset.test.labels, seed)


def deal_validation(
    dataset: Dataset, parts: Sequence[np.ndarray], seed: int, *, users: bool = False
) -> list[np.ndarray]:
    """Deal the validation split to the clients, for their own models: as the test split, by a stream of its own.

    A client's part has the class mix of its training part, whatever the partition. Where clients are users of the data
    set, and the validation split has users too, a client has its own user's samples, or none.

    Args:
        dataset: the splits.
        parts: training parts.
        seed: the run's seed.
        users: whether the partition takes the users of the samples.

    Returns:
        Indices into the validation split, of every client.

    """
    train, val = dataset.train, dataset.val
    if users and train.users is not None and val.users is not None:
        return user_tests(train.users, val.users)
    return client_tests(parts, train.labels, val.labels, seed, validation=True)


def _classes(split: Split) -> np.ndarray:
    """Class of each sample (N,); NO_CLASS where targets are sequences, which only some partitions accept."""
    return split.labels if split.y.ndim == 1 else np.full(len(split.y), NO_CLASS)
