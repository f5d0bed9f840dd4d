"""What AutoFLIP's deviations measure: ``python -m fedsparse.studies.correlations <folder of runs> ...``.

For each run: Spearman's rank correlation of the mean squared deviation of its exploration with the magnitude of the
start and with the Fisher information there (squared gradients of single samples, all clients' data), and how much the
deviation spreads. Only counted coordinates that some client moved: of the others, such as weights of pixels that are
always black, all three are 0, which would pass for agreement. Runs need ``explore.save=true`` (``make autoflip``).

Shapes: P coordinates, n of them counted and moved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from scipy import stats

from fedsparse.analysis.folders import Run, read_runs
from fedsparse.analysis.statistics import Interval
from fedsparse.core.folder import DEVIATION
from fedsparse.core.signals import command
from fedsparse.job.earlier import renewed
from fedsparse.landscape.scale import at_start
from fedsparse.masks.scores import fisher_per_sample
from fedsparse.preparation.preparation import Preparation

Figures = Mapping[str, float]
Group = tuple[str, str, str]  # model, partition, optimizer
WIDTH = 160  # where nobody watches
HEAD = {
    "magnitude": "rho with |start|",
    "magnitude_within": "rho |start|, in tensors",
    "fisher": "rho with Fisher",
    "fisher_within": "rho Fisher, in tensors",
    "variation": "std / mean",
    "ratio": "90th / 10th percentile",
    "unmoved": "never moved, %",
}


def figures(deviation: np.ndarray, magnitude: np.ndarray, fisher: np.ndarray, tensor: np.ndarray) -> dict[str, float]:
    """Relate a deviation to other scores of the same coordinates.

    Args:
        deviation: mean squared deviation of the counted coordinates, not negative.
        magnitude: absolute values of their start.
        fisher: their squared gradients.
        tensor: number of the tensor that each belongs to.

    Returns:
        Spearman's correlations over all coordinates that moved, and the mean over tensors of those within a tensor;
        the coefficient of variation and the ratio of the 90th to the 10th percentile of the deviation; the share that
        never moved. NaN where a correlation is not defined.

    """
    moved = deviation > 0
    d, which = deviation[moved], tensor[moved]
    found = {"unmoved": 1 - float(moved.mean())}
    for name, scores in (("magnitude", magnitude[moved]), ("fisher", fisher[moved])):
        within = [spearman(d[which == t], scores[which == t]) for t in np.unique(which)]
        defined = [value for value in within if np.isfinite(value)]
        found[name] = spearman(d, scores)
        found[f"{name}_within"] = float(np.mean(defined)) if defined else float("nan")
    low, high = np.quantile(d, [0.1, 0.9])
    return found | {"variation": float(d.std() / d.mean()), "ratio": float(high / low)}


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Correlate ranks, ties at their mean rank; NaN where one of the two is constant.

    >>> spearman(np.array([1.0, 2.0, 9.0]), np.array([3.0, 2.0, 1.0]))
    -1.0
    """
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)


def measure(run: Run) -> dict[str, float]:
    """Relate what a run's clients explored to its start, which is built again."""
    _, preparation = at_start(run.folder)
    space, stored = preparation.space, load_file(run.folder / DEVIATION)
    numbers = {
        name: torch.full(shape, i) for i, (name, shape) in enumerate(zip(space.names, space.shapes, strict=True))
    }
    counted = ~space.where(_always(run)).cpu()
    rows = [_row(space.names, stored), space.read(preparation.net).abs().cpu(), fisher(preparation).cpu()]
    chosen = [row.double()[counted].numpy() for row in rows]
    return figures(chosen[0], chosen[1], chosen[2], _row(space.names, numbers)[counted].numpy())


def fisher(preparation: Preparation) -> torch.Tensor:
    """Sum the squared gradients of single samples over all clients' data: float64 (P,)."""
    total = torch.zeros(preparation.space.size, dtype=torch.float64, device=preparation.device)
    for x, y in preparation.batches(preparation.dataset.train, np.sort(np.concatenate(preparation.parts))):
        fisher_per_sample(preparation.net, preparation.space, x, y, loss=preparation.losses, into=total)
    return total


def _always(run: Run) -> str:
    """Patterns of what a mask does not count: those of the head."""
    return run.config["model.head"]


def _row(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def grouped(runs: Iterable[Run]) -> dict[Group, list[Figures]]:
    """Measure every run that saved what it explored, by model, partition and optimizer.

    Raises:
        ValueError: there is none.

    """
    found: dict[Group, list[Figures]] = {}
    for run in runs:
        if (run.folder / DEVIATION).is_file():
            optimizer = run.config["optimizer._target_"].rsplit(".", 1)[-1].removeprefix("Sparse")
            key = (run.config["model"], run.summary["partition"], optimizer)
            found.setdefault(key, []).append(measure(run))
    if not found:
        raise ValueError(f"no run holds {DEVIATION}; run with mask_rule=autoflip explore.save=true")
    return found


def table(found: Mapping[Group, Sequence[Figures]]) -> Table:
    """Lay out means over seeds ± half the 95 % interval."""
    shown = Table(
        title="Deviation of exploring clients: mean over seeds ± half the 95 % interval", title_justify="left"
    )
    for name in ("model", "partition", "optimizer", *HEAD.values(), "seeds"):
        shown.add_column(name)
    for key, runs in sorted(found.items()):
        cells = [_cell(name, [run[name] for run in runs]) for name in HEAD]
        shown.add_row(*key, *cells, str(len(runs)))
    return shown


def _cell(name: str, values: Sequence[float]) -> str:
    defined = [value for value in values if np.isfinite(value)]
    return Interval.of(defined).percent() if name == "unmoved" else Interval.of(defined).text(digits=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the runs below some folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that hold some at any depth")
    try:
        shown = table(grouped(read_runs(parser.parse_args(arguments).folders, renewed)[0]))
    except ValueError as error:
        sys.exit(f"fedsparse: {error}")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(shown)


if __name__ == "__main__":
    with command():
        main()
