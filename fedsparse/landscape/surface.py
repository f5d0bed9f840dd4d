"""Losses and accuracies of rows on a split, stacked or one after the other.

Shapes: M points, K of a chunk, P coordinates of the space, N samples, B of a batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_whole
from fedsparse.core.targets import hits
from fedsparse.data.datasets import Split
from fedsparse.federation.federation import Federation
from fedsparse.landscape.directions import Plane
from fedsparse.landscape.task import Task
from fedsparse.models.stacked import Stacked, stacks

POINTS = 16  # of a chunk
SAMPLES = 500  # of a batch of one point
STACKED = 3000  # points times samples of a stacked batch: more leave a CPU's caches, and its heap
BYTES = 1 << 27  # of a chunk's rows


class Evaluated(NamedTuple):
    """Mean loss, by the task's weights, and accuracy of M points; NaN at points whose loss is not finite.

    Attributes:
        loss: float64 (M,).
        accuracy: float64 (M,), between 0 and 1.

    """

    loss: Tensor
    accuracy: Tensor

    @property
    def gaps(self) -> int:
        """Points whose loss is not finite."""
        return int(self.loss.isnan().sum())


Form = Callable[[Task, Tensor, Split], Evaluated]


def evaluate_rows(
    federation: Federation,
    rows: Tensor,
    split: Split,
    training: Split | None = None,
    form: str = "fastest",
    *,
    points: int = POINTS,
    samples: int = SAMPLES,
    stacked: int = STACKED,
) -> Evaluated:
    """Evaluate models (M, P) on a split; the federation's network keeps weights, statistics, modes and random state.

    Args:
        federation: whose network and losses.
        rows: (M, P).
        split: the samples.
        training: for BatchNorm; see ``Task``.
        form: see ``evaluate``.
        points: of a chunk; see ``chunk_size``.
        samples: of a batch of one point; see ``evaluate``.
        stacked: points times samples of a stacked batch; see ``evaluate``.

    Raises:
        ValueError: no samples, BatchNorm without training samples, an unknown form, or a size below 1.

    """
    task = Task.of(federation.clients, training)
    chunks = rows.split(chunk_size(task, points))
    return joined(evaluate(task, chunks, split, form, samples=samples, stacked=stacked))


def evaluate_plane(
    task: Task, plane: Plane, a: Tensor, b: Tensor, split: Split, form: str = "fastest", *, points: int = POINTS
) -> Iterator[Evaluated]:
    """Evaluate the points of a plane chunk by chunk, whose rows are made when it is their turn.

    Args:
        task: network and losses.
        plane: in which the points lie.
        a: first coordinates (M,).
        b: second coordinates (M,).
        split: the samples.
        form: see ``evaluate``.
        points: of a chunk; see ``chunk_size``.

    Raises:
        ValueError: as ``evaluate``, or a chunk of no point.

    """
    size = chunk_size(task, points)
    chunks = (plane.point(*at) for at in zip(a.split(size), b.split(size), strict=True))
    return evaluate(task, chunks, split, form)


def evaluate(
    task: Task,
    chunks: Iterable[Tensor],
    split: Split,
    form: str = "fastest",
    *,
    samples: int = SAMPLES,
    stacked: int = STACKED,
) -> Iterator[Evaluated]:
    """Evaluate chunks of rows (K, P).

    Args:
        task: network and losses.
        chunks: the rows; see ``chunk_size``.
        split: the samples.
        form: ``stacked`` runs the K points of a chunk together, ``single`` one after the other, and both agree to
            rounding. ``fastest`` tries both on the first chunk. Stacking gains for small models; on a CPU a transformer
            gains nothing.
        samples: of a batch of one point, at most.
        stacked: points times samples of a stacked batch, at most, though a batch has one sample of each point.

    Raises:
        ValueError: no samples, an unknown form, ``stacked`` of a model that cannot be, or a size below 1.

    """
    check_whole("samples", samples, 1)
    check_whole("stacked", stacked, 1)
    check_choice("form", form, "fastest", "stacked", "single")
    if not len(split.y):
        raise ValueError("a loss needs at least one sample")
    stackable = form != "single" and _stacks(task, split)
    if form == "stacked" and not stackable:
        raise ValueError("form=stacked does not go with this model or loss, which take one point at a time")
    single, whole = partial(one_by_one, samples=samples), partial(together, stacked=stacked)
    chosen: Form | None = (whole if form == "stacked" else None) if stackable else single
    for rows in chunks:
        if chosen is None and len(rows) > 1:
            chosen, found = _faster(task, rows, split, (single, whole))
        else:
            found = (chosen or single)(task, rows, split)
        yield found


def joined(parts: Iterable[Evaluated]) -> Evaluated:
    """Join chunks into one result."""
    losses, accuracies = zip(*parts, strict=True)
    return Evaluated(torch.cat(losses), torch.cat(accuracies))


def chunk_size(task: Task, points: int = POINTS) -> int:
    """K, the points of a chunk; also what a kill loses, and what one process takes at a time.

    Args:
        task: the network, whose rows of a chunk take at most ``BYTES``.
        points: K at most.

    Raises:
        ValueError: no point.

    """
    check_whole("points", points, 1)
    row = sum(tensor.nbytes for tensor in task.space.tensors(task.net))
    return max(1, min(points, BYTES // row))


@torch.no_grad()
def one_by_one(task: Task, rows: Tensor, split: Split, samples: int) -> Evaluated:
    """Evaluate rows (K, P) one after the other."""
    sums = torch.zeros(2, len(rows), dtype=torch.float64, device=task.device)
    with task.untouched():
        for k, row in enumerate(rows):
            net = task.load(row)
            for x, y in task.batches(split, samples):
                logits = net(x)
                sums[0, k] += _weighted(task, logits, x, y).sum()
                sums[1, k] += hits(logits, y).sum()
    return _means(task, sums, rows, split)


@torch.no_grad()
def together(task: Task, rows: Tensor, split: Split, stacked: int) -> Evaluated:
    """Evaluate rows (K, P) in one forward for each batch: the K copies of a batch lie one behind the other."""
    points, sums = len(rows), torch.zeros(2, len(rows), dtype=torch.float64, device=task.device)
    net = Stacked(task.net, task.space.unflatten(rows.to(task.like)))
    with task.untouched():
        for x, y in task.batches(split, max(1, stacked // points)):
            logits, labels = net(x.repeat(points, *[1] * (x.dim() - 1))), y.repeat(points, *[1] * (y.dim() - 1))
            losses = _weighted(task, logits, x, labels)
            sums[0] += losses.view(points, -1).sum(1)
            sums[1] += hits(logits, labels).view(points, -1).sum(1)
    return _means(task, sums, rows, split)


def _weighted(task: Task, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Weighted losses of samples whose logits are computed already, float64."""
    return task.weighted(task.losses(lambda _: logits, x, y).double(), y)


def _means(task: Task, sums: Tensor, rows: Tensor, split: Split) -> Evaluated:
    """Mean loss and accuracy from the sums of both (2, K); a point that is not finite is a gap in both."""
    means = torch.stack([sums[0] / task.total(split), sums[1] / len(split.y)]).cpu()
    gap = ~means[0].isfinite() | ~rows.isfinite().all(1).cpu()
    return Evaluated(*means.masked_fill(gap, float("nan")))


def _stacks(task: Task, split: Split) -> bool:
    """Whether points can be stacked, tried on two samples."""
    if not task.stackable:
        return False
    index = torch.arange(min(2, len(split.y)))
    with task.untouched():
        return stacks(task.net, task.space.names, task.inputs(split.x[index].to(task.device)))


def _faster(task: Task, rows: Tensor, split: Split, forms: Iterable[Form]) -> tuple[Form, Evaluated]:
    """Evaluate a chunk in both forms: the faster one, and its result."""
    tries = []
    for form in forms:
        start = time.perf_counter()
        found = form(task, rows, split)  # its result is on the CPU: the device has finished
        tries.append((time.perf_counter() - start, form, found))
    _, form, found = min(tries, key=lambda one: one[0])
    return form, found
