"""How far along its own way a finished run is best: theta_0 + alpha (theta_T - theta_0), alpha chosen on validation.

Task arithmetic (Ilharco et al. 2023) on the change that the federation made. The start is made again from the stored
configuration: model and head depend on it and the seed alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsparse.core import files
from fedsparse.core.folder import SCALE, SUMMARY, WEIGHTS
from fedsparse.core.weights import load_weights
from fedsparse.data.datasets import Split
from fedsparse.data.files import printable
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.job.assemble import assemble
from fedsparse.job.command import one_line
from fedsparse.job.prepare import build_preparation, start_head
from fedsparse.job.resume import read_job
from fedsparse.models.modes import evaluating
from fedsparse.preparation.preparation import Preparation

ALPHAS = tuple(round(0.1 * i, 1) for i in range(16))  # 0 to 1.5


def measure(folders: Iterable[Path], trusted: Sequence[str] = ()) -> int:
    """Write ``scale.json`` into every finished run folder below some folders that has none yet.

    Args:
        folders: run folders, or folders that hold some at any depth.
        trusted: names of packages whose code their configurations may name.

    Returns:
        How many folders could not be scaled, each after a line that says why.

    """
    failed = 0
    for folder in sorted({path.parent for top in folders for path in Path(top).rglob(SUMMARY)}):
        if not (folder / SCALE).exists():
            try:
                files.write(folder / SCALE, json.dumps(scaled(folder, trusted), indent=2) + "\n")
            except Exception as error:  # a folder that is damaged, or asks for what it may not; the others go on
                print(printable(f"fedsparse: {folder} was not scaled: {one_line(error)}"), file=sys.stderr)
                failed += 1
    return failed


def scaled(folder: Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's scaled task vectors.

    Args:
        folder: a finished run.
        trusted: names of packages whose code its configuration may name.

    Returns:
        ``alpha`` (the one with the best validation accuracy, the nearest to 1 of equals), ``val/acc`` and ``test/acc``
        there, ``test/acc_at_1``, and all ``alphas`` with their ``val``.

    """
    preparation, start, end = _start_and_end(folder, trusted)
    space, net, data = preparation.space, preparation.net, preparation.dataset

    def at(alpha: float, split: Split) -> float:
        space.write(net, start + alpha * (end - start))
        return accuracy(preparation, split)

    val = [at(alpha, data.val) for alpha in ALPHAS]
    best = best_alpha(ALPHAS, val)
    test, there = data.common_test, max(val)
    facts = {"alpha": best, "val/acc": there, "test/acc": at(best, test), "test/acc_at_1": at(1.0, test)}
    return facts | {"alphas": list(ALPHAS), "val": val}


def best_alpha(alphas: Sequence[float], val: Sequence[float]) -> float:
    """Alpha of the best validation accuracy; of equals the nearest to 1, where the run itself stands.

    >>> best_alpha([0.5, 0.9, 1.2], [0.8, 0.9, 0.9])
    0.9
    """
    return max(zip(alphas, val, strict=True), key=lambda pair: (pair[1], -abs(pair[0] - 1)))[0]


def at_start(folder: Path, trusted: Sequence[str] = ()) -> Preparation:
    """Build a run's data and its model as it was before the first round, from the stored configuration."""
    assembly = assemble(read_job(folder, trusted=trusted).cfg)
    preparation = build_preparation(assembly, assembly.module(), Ledger())
    start_head(assembly, preparation, assembly.method.calibration.head_steps)
    return preparation


def _start_and_end(folder: Path, trusted: Sequence[str]) -> tuple[Preparation, torch.Tensor, torch.Tensor]:
    """Build the run's model as it was before its first round, and read it after its last: rows (P,)."""
    preparation = at_start(folder, trusted)
    start = preparation.space.read(preparation.net)
    preparation.net.load_state_dict(load_weights(folder / WEIGHTS))
    return preparation, start, preparation.space.read(preparation.net)


@torch.no_grad()
def accuracy(preparation: Preparation, split: Split) -> float:
    """Share of a split that the network classifies rightly, in eval mode."""
    batches = preparation.batches(split, np.arange(len(split.y)))
    with evaluating(preparation.net):
        right = sum(int((preparation.net(x).argmax(1) == y).sum()) for x, y in batches)
    return right / len(split.y)
