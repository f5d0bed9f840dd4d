"""A share of the samples that are evaluated, where whole splits would take longer than training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedsparse.core.checks import finite
from fedsparse.data import dealing
from fedsparse.data.datasets import Dataset, Split

_SHARE = 115  # the next stream key after those of ``fedsparse.data.partition``


def evaluated(dataset: Dataset, share: Any) -> Dataset:
    """Keep a random share of the validation and of the test split, ceil(share * N) samples of each.

    The same samples in every round and for every seed of a run, so that rounds and runs can be compared. Clients' own
    tests (``data.local_test``) are drawn afterwards, and stay whole.

    Args:
        dataset: the splits.
        share: above 0 and at most 1; 1 keeps the splits as they are.

    Raises:
        ValueError: the share is out of range, or a split is on the disk.

    """
    if not (finite(share) and 0 < share <= 1):
        raise ValueError(f"federation.eval_share is {share!r}; give a share above 0 and at most 1")
    if share == 1:
        return dataset
    return replace(dataset, val=_kept(dataset.val, share, 0), test=_kept(dataset.test, share, 1))


def _kept(split: Split, share: float, number: int) -> Split:
    size = int(np.ceil(share * len(split.y) - 1e-9))  # nudged: 0.29 * 100 is 28.999999999999996 in floats
    chosen = np.sort(dealing.stream(0, _SHARE, number).choice(len(split.y), size, replace=False))
    if not isinstance(split.x, torch.Tensor):
        raise ValueError("federation.eval_share needs the samples in memory; set data.stream=false, or eval_share=1.0")
    rows = torch.from_numpy(chosen)
    return Split(split.x[rows], split.y[rows], None if split.users is None else split.users[chosen])
