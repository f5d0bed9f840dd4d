"""How alike the masks of the rules are: the Jaccard index, trained in both over trained in either."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedsparse.analysis.files import finite
from fedsparse.analysis.folders import Problem, Run
from fedsparse.analysis.mask_plot import overlap_figure
from fedsparse.analysis.page import Picture, Section, Table, slug
from fedsparse.analysis.statistics import Interval
from fedsparse.analysis.style import plain
from fedsparse.analysis.table import Row, Task, locally
from fedsparse.analysis.tables import said, share
from fedsparse.core.folder import MASK
from fedsparse.masks import Mask, overlaps

_TEXT = (
    "Jaccard index of the masks of the first seed: coordinates that train in both, over those that train in either; 1 "
    "is the same mask. Tensors that train whole in all of the masks, as the head does, are left out. A random mask "
    "that trains a fraction d and any other of its size come to about d / (2 - d): 'by chance'."
)
_WITHIN = (
    "Jaccard index of masks of one rule, over whole models: 'between clients' is the mean over all pairs of clients "
    "that have a mask of their own; 'first round' compares what the first of several calibration rounds would have "
    "given with the mask itself. Mean over seeds ± half the 95 % confidence interval."
)


def section(table: Sequence[Row]) -> tuple[list[Section], list[Problem]]:
    """Compare the rules' masks at each partition and sparsity.

    Returns:
        The section, if there is anything to compare, and the masks that could not be.

    """
    blocks: list[Table | Picture] = []
    problems: list[Problem] = []
    groups = _groups(table)
    several = len({task for task, _, _ in groups}) > 1
    for (task, partition, sparsity), group in groups.items():
        masks, seed = _masks(group, problems)
        if len(masks) > 1:
            name = said(task if several else ("", ""), partition, f"sparsity {share(sparsity)}")
            caption = said(task, partition, f"sparsity {share(sparsity)}", f"seed {seed}")
            blocks += _blocks(slug(name), caption, undecided(masks))
    return ([Section("Mask overlap", _TEXT, blocks)] if blocks else []), problems


def within(table: Sequence[Row]) -> list[Section]:
    """Show how alike masks of one rule are: between clients, and between calibration rounds."""
    found = [(row, _over(row, _clients), _over(row, _first_round)) for row in table]
    body = [
        [row.name, row.partition, share(row.sparsity), clients.text(1, 2), first.text(1, 2)]
        for row, clients, first in found
        if not math.isnan(clients.mean) or not math.isnan(first.mean)
    ]
    head = ["mask rule", "partition", "sparsity", "between clients", "first round"]
    return [Section("Mask overlap within a rule", _WITHIN, [Table(head, body)])] if body else []


def _over(row: Row, figure: Callable[[Run], Any]) -> Interval:
    return Interval.of([value for run in row.runs if finite(value := figure(run))])


def _clients(run: Run) -> Any:
    return run.summary.get("mask_overlap_clients")


def _first_round(run: Run) -> Any:
    rounds = run.summary.get("mask_overlap_rounds")
    return rounds[0] if isinstance(rounds, list) and rounds else None


def undecided(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Leave out the tensors that train whole in every mask."""
    first = next(iter(masks.values()))
    kept = [name for name in first.tensors if not all(mask.tensors[name].all() for mask in masks.values())]
    return {rule: Mask({name: mask.tensors[name] for name in kept}) for rule, mask in masks.items()}


def _groups(table: Sequence[Row]) -> dict[tuple[Task, str, float], list[Row]]:
    groups: dict[tuple[Task, str, float], list[Row]] = {}
    for row in table:
        if row.sparsity and not any(run.archived for run in row.runs):
            groups.setdefault((row.task, row.partition, row.sparsity), []).append(row)
    return {place: locally(groups[place]) for place in sorted(groups)}


def _masks(group: Sequence[Row], problems: list[Problem]) -> tuple[dict[str, Mask], int]:
    """Read the masks of the first seed that all rows have, of one model; say why others are left out.

    Returns:
        Masks by the names of their rows, and the seed.

    """
    seeds = set.intersection(*({run.seed for run in row.runs} for row in group))
    runs = {row.name: next(r for r in row.runs if r.seed == min(seeds)) for row in group} if seeds else {}
    masks: dict[str, Mask] = {}
    for name, run in runs.items():
        mask = _mask(run)
        if mask is None:
            problems.append(Problem(run.name, "mask.safetensors is missing or damaged: not in the mask overlap"))
        elif masks and _shapes(mask) != _shapes(next(iter(masks.values()))):
            problems.append(Problem(run.name, "mask.safetensors is of another model: not in the mask overlap"))
        else:
            masks[name] = mask
    return masks, min(seeds, default=0)


def _mask(run: Run) -> Mask | None:
    try:
        return Mask.load(run.folder / MASK)
    except ValueError:
        return None


def _shapes(mask: Mask) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in mask.tensors.items()}


def _blocks(name: str, caption: str, masks: Mapping[str, Mask]) -> list[Table | Picture]:
    """Make the picture and the table of one group."""
    names, matrix = list(masks), overlaps(list(masks.values())).numpy()
    density = float(np.mean([mask.density for mask in masks.values()]))
    chance = f"{caption}; by chance {density / (2 - density):.2f}"
    body = [[one, *(f"{value:.2f}" for value in line)] for one, line in zip(names, matrix, strict=True)]
    shown = [plain(one) for one in names]
    picture = Picture(f"overlap-{name}", f"Mask overlap, {chance}", lambda: overlap_figure(shown, matrix, caption))
    return [picture, Table(["mask rule", *names], body, chance)]
