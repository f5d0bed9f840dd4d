"""How far along its own way a finished run is best: theta_0 + alpha (theta_T - theta_0), alpha chosen on validation.

A landscape of one dimension: task arithmetic (Ilharco et al. 2023) on the change that the federation made. The start is
made again from the stored configuration: model and head depend on it and the seed alone. BatchNorm's statistics are
computed again at every point.

Shapes: P coordinates, M values of alpha.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsparse.core import files
from fedsparse.core.folder import SCALE, SUMMARY, WEIGHTS
from fedsparse.core.weights import load_weights
from fedsparse.data.datasets import Split
from fedsparse.data.files import printable
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.job.assemble import assemble
from fedsparse.job.command import one_line
from fedsparse.job.parts import Assembly
from fedsparse.job.prepare import build_preparation, start_head
from fedsparse.job.resume import read_job
from fedsparse.landscape.interpolation import between
from fedsparse.landscape.replay import check_frozen
from fedsparse.landscape.surface import chunk_size, evaluate, joined
from fedsparse.landscape.task import Task
from fedsparse.preparation.preparation import Preparation

ALPHAS = tuple(round(0.1 * i, 1) for i in range(16))  # 0 to 1.5
POINTS = 4  # of a chunk; the first one is evaluated in both forms


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
        there, ``test/acc_at_1``, and all ``alphas`` with their ``val``; None where a loss is not finite.

    Raises:
        ValueError: the configuration may not be read, frozen weights change, or no loss is finite.

    """
    assembly, preparation = at_start(folder, trusted)
    check_frozen(assembly, folder)
    space, net, data = preparation.space, preparation.net, preparation.dataset
    start = space.read(net)
    net.load_state_dict(load_weights(folder / WEIGHTS))
    end = space.read(net)
    clients = assembly.module().to(preparation.device).form()
    task = Task.of(clients, assembly.problem.dealt)
    clients.release()

    val = accuracies(task, start, end, ALPHAS, data.val)
    best = best_alpha(ALPHAS, val)
    there, at_1 = accuracies(task, start, end, (best, 1.0), data.common_test)
    facts = {"alpha": best, "val/acc": val[ALPHAS.index(best)], "test/acc": there, "test/acc_at_1": at_1}
    return facts | {"alphas": list(ALPHAS), "val": val}


def accuracies(task: Task, start: Tensor, end: Tensor, alphas: Sequence[float], split: Split) -> list[float | None]:
    """Evaluate the models start + alpha (end - start), rows (P,): M accuracies, None where a loss is not finite."""
    at = torch.tensor(alphas, dtype=torch.float64)
    chunks = (between(start, end, part) for part in at.split(chunk_size(task, POINTS)))
    found = joined(evaluate(task, chunks, split)).accuracy
    return [None if math.isnan(accuracy) else accuracy for accuracy in found.tolist()]


def best_alpha(alphas: Sequence[float], val: Sequence[float | None]) -> float:
    """Alpha of the best validation accuracy; of equals the nearest to 1, where the run itself stands.

    Raises:
        ValueError: no accuracy is given.

    >>> best_alpha([0.5, 0.9, 1.2, 1.4], [0.8, 0.9, 0.9, None])
    0.9
    """
    given = [(alpha, accuracy) for alpha, accuracy in zip(alphas, val, strict=True) if accuracy is not None]
    if not given:
        raise ValueError("no model on the way from the start to the end has a finite loss")
    return max(given, key=lambda pair: (pair[1], -abs(pair[0] - 1)))[0]


def at_start(folder: Path, trusted: Sequence[str] = ()) -> tuple[Assembly, Preparation]:
    """Build a run's parts, with its model as it was before the first round, from the stored configuration."""
    assembly = assemble(read_job(folder, trusted=trusted).cfg)
    preparation = build_preparation(assembly, assembly.module(), Ledger())
    start_head(assembly, preparation, assembly.method.calibration.head_steps)
    return assembly, preparation
