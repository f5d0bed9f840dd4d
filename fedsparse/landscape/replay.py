"""The models of a run at the end of a round (a stand-in: clients take a few plain steps from the global row).

Shapes: P coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedsparse.core.folder import CONFIG, MASK, SUMMARY, TRAJECTORY, WEIGHTS
from fedsparse.core.weights import load_weights
from fedsparse.federation.trajectory import read_row
from fedsparse.job.assemble import Assembly, assemble
from fedsparse.job.resume import read_job
from fedsparse.masks import Mask


@dataclass(frozen=True)
class Models:
    """A run's models at the end of a round.

    Attributes:
        folder: the run folder.
        assembly: the parts of the run; the network holds the last global model.
        round: rounds closed.
        global_row: (P,).
        mask: bool (P,), what trained last.

    """

    folder: Path
    assembly: Assembly
    round: int
    global_row: Tensor
    mask: Tensor


def load(folder: Path, round: int | None = None, trusted: Sequence[str] = ()) -> Models:
    """Read the global model of a finished run.

    Raises:
        ValueError: the run is not finished, or the row was not kept.

    """
    if not all((folder / name).is_file() for name in (SUMMARY, WEIGHTS, CONFIG)):
        raise ValueError(f"{folder} holds no finished run; python -m fedsparse.train resume={folder} finishes one")
    assembly = assemble(read_job(folder, trusted=trusted).cfg)
    problem, total = assembly.problem, assembly.course.phases.total
    problem.net.load_state_dict(load_weights(folder / WEIGHTS))
    row, mask = problem.space.read(problem.net), Mask.load(folder / MASK).row(problem.space)
    if round is not None and round != total:
        row = read_row(folder / TRAJECTORY, round).to(row.dtype)
    return Models(folder, assembly, total if round is None else round, row, mask)


def local_row(models: Models, client: int) -> Tensor:
    """Train a client: its row (P,).

    Raises:
        ValueError: no such client, or one without data.

    """
    problem = models.assembly.problem
    if not 0 <= client < len(problem.parts):
        raise ValueError(f"client:{client} is none of the {len(problem.parts)} clients, 0 to {len(problem.parts) - 1}")
    if not len(problem.parts[client]):
        raise ValueError(f"client:{client} holds no data, so that it has no model of its own")
    index, row = torch.from_numpy(problem.parts[client]), models.global_row.clone()
    x, y = problem.inputs(problem.dataset.train.x[index]), problem.dataset.train.y[index]
    for _ in range(5):
        leaf = row.requires_grad_()
        loss = cross_entropy(functional_call(problem.net, problem.space.unflatten(leaf), (x,)), y)
        row = (row - 0.1 * torch.autograd.grad(loss, leaf)[0] * models.mask).detach()
    return row
