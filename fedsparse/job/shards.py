"""Who holds which samples, for training and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from fedsparse.data.datasets import Dataset
from fedsparse.data.own_tests import own_tests, with_own_tests
from fedsparse.data.partition import client_tests
from fedsparse.data.splits import user_tests


def build_clients(cfg: DictConfig, dataset: Dataset) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """Deal training samples and test parts to the clients; with ``data.local_test`` the latter are of their own."""
    parts = build_parts(cfg, dataset)
    if cfg.data.get("local_test") is None:
        return dataset, parts, build_tests(cfg, dataset, parts)
    parts, kept = own_tests(parts, _labels(dataset.train), cfg.data.local_test, cfg.seed)
    longer, tests = with_own_tests(dataset, kept)
    return longer, parts, tests


def build_parts(cfg: DictConfig, dataset: Dataset) -> list[np.ndarray]:
    """Deal the training split to the clients."""
    deal = instantiate(cfg.partition)
    users = {"users": dataset.train.users} if "users" in cfg.partition else {}
    return deal(labels=_labels(dataset.train), num_clients=cfg.federation.num_clients, seed=cfg.seed, **users)


def build_tests(cfg: DictConfig, dataset: Dataset, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Give every client its part of the test split: its user's, as the partition deals it, or by its own class mix."""
    if "users" in cfg.partition and dataset.train.users is not None and dataset.test.users is not None:
        return user_tests(dataset.train.users, dataset.test.users)
    if "test" in cfg.partition:
        deal, clients = instantiate(cfg.partition), cfg.federation.num_clients
        return list(deal(labels=_labels(dataset.test), num_clients=clients, seed=cfg.seed, test=True))
    return client_tests(parts, _labels(dataset.train), _labels(dataset.test), cfg.seed)


def _labels(split: Any) -> np.ndarray:
    return split.y.cpu().numpy()
