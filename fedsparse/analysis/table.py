"""Rows of every table: runs over seeds, at the learning rate that validates best, beside their dense counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedsparse.analysis.files import finite
from fedsparse.analysis.folders import Problem, Run
from fedsparse.analysis.names import LABEL, Group, Settings, labels, settings
from fedsparse.analysis.statistics import Interval, paired
from fedsparse.core.monitor import ACCURACY, PERSONAL_ACCURACY

_PROTOCOL = ("data", "model", "partition", "federation.")  # dense training must share these to be compared with
_TRAINABLE = ("model.trainable", "model.local")


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone, at the learning rate that validated best.

    Attributes:
        name: mask rule, and what else differs between the runs at hand.
        partition: how the data are dealt.
        sparsity: fraction frozen, 0 without a mask.
        lr: the chosen learning rate.
        lr_at_edge: whether it is the smallest or the largest of several.
        runs: the chosen runs, by seed.
        settings: what the runs share.

    """

    name: str
    partition: str
    sparsity: float
    lr: float
    lr_at_edge: bool
    runs: tuple[Run, ...]
    settings: Settings = field(repr=False)

    @property
    def exchange(self) -> str:
        """Label of the sparse exchange, "" without one."""
        return self.settings.get(LABEL, "")

    @property
    def dense(self) -> bool:
        """Whether there is neither a mask nor a sparse exchange: what others are compared with."""
        return self.settings["mask_rule"] == "dense" and not self.exchange

    @property
    def explored(self) -> bool:
        """Whether clients explored before they learned."""
        return "explore" in self.settings.get("phases", "").split(", ")

    @property
    def head_start(self) -> bool:
        """Whether the model keeps what clients explored: AutoFLIP's code does so, and FedAvg has nothing like it."""
        return self.settings.get("explore.keep_model") == "true"

    def by_seed(self, key: str) -> dict[int, float]:
        """Give a figure of the summaries by seed, where it is a finite number."""
        return {run.seed: run.summary[key] for run in self.runs if finite(run.summary.get(key))}

    def over_seeds(self, key: str) -> Interval:
        """Estimate a figure of the summaries."""
        return Interval.of(list(self.by_seed(key).values()))

    def against(self, other: Row, key: str) -> Interval:
        """Estimate the difference to another row, by seed."""
        return paired(self.by_seed(key), other.by_seed(key))


def rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs by all that matters but seed and learning rate, and keep the rate with the best mean validation.

    Only rates that all seeds have tried compete: a rate with a missing seed has lost a run, or is not finished.
    Sorted by partition, sparsity and name.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    found = [Group.of(dict(key), group) for key, group in groups.items()]
    named = zip(labels(found), groups.items(), strict=True)
    table = [_row(name, partition, dict(key), group) for (name, partition), (key, group) in named]
    return sorted(table, key=lambda row: (row.partition, row.sparsity, row.name))


def once(runs: Sequence[Run]) -> tuple[list[Run], int, list[Problem]]:
    """Keep one run of each setting, learning rate and seed: a dense run of every sparsity is the same run.

    Returns:
        The runs to count, the number of repetitions, and those that came to other figures.

    """
    first: dict[tuple, Run] = {}
    for run in runs:
        first.setdefault(_place(run), run)
    others = [(run, first[_place(run)]) for run in runs if first[_place(run)] is not run]
    apart = [
        Problem(run.name, f"repeats {kept.name} with another result, {_percent(run)} for {_percent(kept)}; not counted")
        for run, kept in others
        if run.summary["test/acc"] != kept.summary["test/acc"]
    ]
    return list(first.values()), len(others), apart


def dense_of(row: Row, table: Sequence[Row]) -> Row | None:
    """Find dense training of the same data, model, partition and rounds, all sent; of several, the one most alike."""
    dense = [r for r in table if r.dense and _protocol(r) == _protocol(row)]
    return min(dense, key=lambda other: _distance(row, other), default=None)


def partitions(table: Sequence[Row]) -> list[str]:
    """List the partitions, in the order of their names."""
    return sorted({row.partition for row in table})


def sparsities(table: Sequence[Row]) -> list[float]:
    """List the sparsities of rows with a mask, ascending."""
    return sorted({row.sparsity for row in table if row.sparsity})


def _percent(run: Run) -> str:
    return f"{run.summary['test/acc']:.2%}"


def _key(run: Run) -> tuple:
    return tuple(sorted(settings(run).items()))


def _place(run: Run) -> tuple:
    return (_key(run), run.lr, run.seed)


def _row(name: str, partition: str, shared: Settings, runs: Sequence[Run]) -> Row:
    rates = {lr: [run for run in runs if run.lr == lr] for lr in sorted({run.lr for run in runs})}
    most = max(map(len, rates.values()))
    full = [lr for lr, tried in rates.items() if len(tried) == most]
    own = all(finite(run.summary.get(PERSONAL_ACCURACY)) for run in runs)
    key = PERSONAL_ACCURACY if own else ACCURACY
    best = max(full, key=lambda lr: float(np.mean([run.summary[key] for run in rates[lr]])))
    edge = len(rates) > 1 and best in (min(rates), max(rates))
    chosen = tuple(sorted(rates[best], key=lambda run: run.seed))
    return Row(name, partition, chosen[0].sparsity, best, edge, chosen, shared)


def _protocol(row: Row) -> dict[str, str]:
    kept = {key: value for key, value in row.settings.items() if key.startswith(_PROTOCOL)}
    kept = {key: value for key, value in kept.items() if key not in _TRAINABLE}
    return kept | {"head start": str(row.head_start)}


def _distance(row: Row, other: Row) -> tuple[bool, int, str]:
    """Order dense rows: those that train all first, then by the number of settings that differ, then by name."""
    partial = other.settings.get(_TRAINABLE[0], "all") != "all"
    return partial, len(set(row.settings.items()) ^ set(other.settings.items())), other.name
