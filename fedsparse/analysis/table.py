"""Rows of every table: runs over seeds, at the learning rate that validates best; what they are about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedsparse.analysis.files import finite
from fedsparse.analysis.folders import Problem, Run
from fedsparse.analysis.names import LABEL, PHASES, Group, Settings, labels, settings
from fedsparse.analysis.statistics import Interval, paired
from fedsparse.core.monitor import ACCURACY, OWN_ACCURACY, PERSONAL_ACCURACY, TEST_ACCURACY, headline_of

_BUDGET = re.compile(r"\$\{rounds_for_steps:(\d+)\}")
Task = tuple[str, str]  # data, model


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
        return "explore" in self.phases

    @property
    def head_start(self) -> bool:
        """Whether the model keeps what clients explored: AutoFLIP's code does so, and FedAvg has nothing like it."""
        return self.settings.get("explore.keep_model") == "true"

    @property
    def task(self) -> Task:
        """Data and model: accuracies of others are on other scales."""
        return self.settings.get("data", ""), self.settings.get("model", "")

    @property
    def own(self) -> bool:
        """Whether something stays with the clients: then their own models count, and not the global one."""
        return all(finite(run.summary.get(OWN_ACCURACY)) for run in self.runs)

    @property
    def headline(self) -> str:
        """The test accuracy that counts."""
        return OWN_ACCURACY if self.own else TEST_ACCURACY

    @property
    def worst(self) -> str:
        """The accuracy of the worst tenth of the clients that counts."""
        return "personal/acc_worst10" if self.own else "client/acc_worst10"

    @property
    def validated(self) -> str:
        """The validation accuracy that counts."""
        return PERSONAL_ACCURACY if all(finite(run.summary.get(PERSONAL_ACCURACY)) for run in self.runs) else ACCURACY

    @property
    def length(self) -> str:
        """How long a run is, as it was asked for: rounds, clients of a round and their local steps."""
        rounds = self.settings.get("federation.rounds") or f"{self.over_seeds('rounds').mean:.0f}"
        budget = _BUDGET.fullmatch(rounds)
        said = f"{budget[1]} client steps in rounds" if budget else "1 round" if rounds == "1" else f"{rounds} rounds"
        clients, steps = clients_of(self.settings), _local(self.settings)
        each = " of " * bool(clients or steps) + " x ".join(filter(None, [f"{clients} clients" * bool(clients), steps]))
        return ", then ".join([said + each, *[name for name in self.phases if name != "explore"]])

    @property
    def phases(self) -> list[str]:
        """Names of the phases beyond head, calibration and learning."""
        return [name for name in self.settings.get(PHASES, "").split(", ") if name]

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
        if run.summary[headline_of(run.summary)] != kept.summary[headline_of(kept.summary)]
    ]
    return list(first.values()), len(others), apart


def tasks(table: Sequence[Row]) -> dict[Task, list[Row]]:
    """Give the rows of each data set and model, named by what differs among them."""
    return {task: locally([row for row in table if row.task == task]) for task in sorted({row.task for row in table})}


def lengths(table: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Give the rows of each data set, model and length of training, named by what differs among them."""
    places = sorted({(*row.task, row.length) for row in table})
    return {place: locally([row for row in table if (*row.task, row.length) == place]) for place in places}


def locally(group: Sequence[Row]) -> list[Row]:
    """Leave out of the names of rows what all of them share, but the rule and the sparse exchange."""
    named = [parts(row.name) for row in group]
    shared = set.intersection(*(set(name[1:]) for name in named)) if named else set()
    shared = shared.difference(*(parts(row.exchange) for row in group))
    short = [", ".join([name[0], *(part for part in name[1:] if part not in shared)]) for name in named]
    return [replace(row, name=name) for row, name in zip(group, short, strict=True)]


def parts(name: str) -> list[str]:
    """Split a name; a list within it stays whole.

    >>> parts("random, fedadam, exchange.fraction=[0.1, 0.3]")
    ['random', 'fedadam', 'exchange.fraction=[0.1, 0.3]']
    """
    return re.split(r", (?![^\[]*\])", name)


def seeds(table: Sequence[Row]) -> str:
    """Say over how many seeds rows are.

    >>> seeds([])
    ''
    """
    counts = sorted({len(row.runs) for row in table})
    few = f"{counts[0]} to " if len(counts) > 1 else ""
    return f"{few}{counts[-1]} {'seed' if counts[-1] == 1 else 'seeds'}" if counts else ""


def clients_of(shared: Settings) -> int:
    """Count the clients of a round; 0 where that is not given."""
    chosen, clients = (shared.get(f"federation.{key}", "") for key in ("clients_per_round", "num_clients"))
    try:
        return max(1, int(float(chosen) * int(clients) + 0.5)) if "." in chosen else int(chosen)
    except ValueError:
        return 0


def _local(shared: Settings) -> str:
    """Say how long a client trains in a round; "" where that is not given."""
    for key, unit in (("local_steps", "steps"), ("local_epochs", "epochs")):
        if (count := shared.get(f"federation.{key}", "null")) not in ("null", ""):
            return f"{count} {unit.removesuffix('s') if count == '1' else unit}"
    return ""


def partitions(table: Sequence[Row]) -> list[str]:
    """List the partitions, in the order of their names."""
    return sorted({row.partition for row in table})


def sparsities(table: Sequence[Row]) -> list[float]:
    """List the sparsities of rows with a mask, ascending."""
    return sorted({row.sparsity for row in table if row.sparsity})


def _percent(run: Run) -> str:
    return f"{run.summary[headline_of(run.summary)]:.2%}"


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
