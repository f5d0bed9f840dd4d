"""Mask rules at equal client steps, where some runs explore first: what exploring gains, and its head start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedsparse.analysis.baseline import protocol
from fedsparse.analysis.files import DASH
from fedsparse.analysis.names import pruned
from fedsparse.analysis.page import Section, Table
from fedsparse.analysis.table import Row, clients_of, locally
from fedsparse.analysis.tables import accuracy, difference, megabytes, own_note, said

_STEPS = "client_steps"
_REFERENCES = ("dense", "random")
_BUDGET = ("federation.rounds", "explore.keep_model")  # may differ where client steps are equal
_HEAD = (
    "mask rule",
    "density",
    "lr",
    "client steps",
    "rounds, exploring included",
    "all traffic, MB",
    "test accuracy, %",
    "difference to dense, points",
    "difference to random, points",
)
_TEXT = (
    "Clients of some rules explore before they learn. Those steps count, and so do gradients of a calibration: every "
    "row of a table has the same client steps in all, within one round of learning, so that what prepares longer "
    "learns for fewer rounds; rows of other budgets are not in it. Mean over seeds ± half the 95 % interval; "
    "differences are paired by seed. Bold, ▲ or ▼: the interval lies above or below 0. "
)
_START = (
    "AutoFLIP's public code goes from client to client in one model while it explores, and keeps that model: a head "
    "start by training in turn. Here every rule has it, and dense training too; 'gained by the head start' is the "
    "difference to the same rule without it, at the same client steps."
)


def section(table: Sequence[Row]) -> Iterable[Section]:
    """Compare at equal client steps, if clients of any run explored and all of them counted their steps."""
    shown = [row for row in table if steps(row) and not row.exchange]
    plain, started = ([_table(group, shown, head) for group in budgets(shown, head)] for head in (False, True))
    parts = [Section("Equal client steps", _TEXT + own_note(shown), plain)] if plain or started else []
    return [*parts, *([Section("Head start", _START, started)] if started else [])]


def budgets(table: Sequence[Row], head_start: bool) -> list[list[Row]]:
    """Gather rows of one data set, model and partition whose client steps agree within one round of learning.

    Only groups in which clients of a row explored: others are compared in every table.
    """
    groups: list[list[Row]] = []
    for row in sorted((r for r in table if r.head_start == head_start), key=lambda r: (*_place(r), -steps(r), r.name)):
        first = groups[-1][0] if groups else None
        if first and _place(first) == _place(row) and steps(first) - steps(row) <= of_round(first):
            groups[-1].append(row)
        else:
            groups.append([row])
    alone = head_start  # is compared with the same rule without it
    return [group for group in groups if any(row.explored for row in group) and (alone or len(group) > 1)]


def _place(row: Row) -> tuple[str, str, str]:
    return (*row.task, row.partition)


def steps(row: Row) -> float:
    """Client steps of a run, the mean over seeds; 0 where a run has not counted them."""
    found = row.by_seed(_STEPS)
    return sum(found.values()) / len(found) if len(found) == len(row.runs) else 0.0


def counterpart(row: Row, table: Sequence[Row], rule: str, head_start: bool | None = None) -> Row | None:
    """Find the row of another rule to compare with: same data, model, partition and density, and equal client steps.

    Args:
        row: what is compared.
        table: all rows.
        rule: ``dense`` at whatever density, or a mask rule at the same one.
        head_start: of the counterpart; None: as the row's.

    Returns:
        The row nearest in client steps, if that is within one round of learning; of several the one most alike.

    """
    start = row.head_start if head_start is None else head_start
    alike = [
        other for other in table if other.runs != row.runs and _alike(other, row, rule) and other.head_start == start
    ]
    near = [other for other in alike if abs(steps(other) - steps(row)) <= of_round(other)]
    return min(near, key=lambda other: (abs(steps(other) - steps(row)), _apart(row, other), other.name), default=None)


def _apart(row: Row, other: Row) -> int:
    """Count the settings in which two rows differ."""
    return len(set(row.settings.items()) ^ set(other.settings.items()))


def of_round(row: Row) -> float:
    """Client steps of a learning round: clients of a round times their local steps, 0 where steps are not given."""
    try:
        return clients_of(row.settings) * int(row.settings.get("federation.local_steps", ""))
    except ValueError:
        return 0.0


def _alike(other: Row, row: Row, rule: str) -> bool:
    """Whether a row is of a rule and shares all else, as sparse as the other unless the rule is dense."""
    named = other.settings["mask_rule"] == rule and protocol(other, _BUDGET) == protocol(row, _BUDGET)
    same = other.sparsity == row.sparsity and pruned(other.settings) == pruned(row.settings)
    return named and (rule == "dense" or same)


def _table(group: Sequence[Row], table: Sequence[Row], head_start: bool) -> Table:
    """Lay out a group: dense, then by density from the most, then by accuracy."""
    order = sorted(group, key=lambda row: (not row.dense, row.sparsity, -row.over_seeds(row.headline).mean, row.name))
    head = [*_HEAD, *["gained by the head start, points"] * head_start, "seeds"]
    most, least = steps(max(group, key=steps)), steps(min(group, key=steps))
    count = f"{most:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
    caption = said(group[0].task, group[0].partition, f"{count} client steps")
    named = locally(order)
    return Table(head, [[_label(row, named), *_cells(row, table, head_start)] for row in named], caption)


def _cells(row: Row, table: Sequence[Row], head_start: bool) -> list[str]:
    """Write the figures of a row; a rule is not compared with itself."""
    others = [None if row.settings["mask_rule"] == rule else counterpart(row, table, rule) for rule in _REFERENCES]
    if head_start:
        others.append(counterpart(row, table, row.settings["mask_rule"], head_start=False))
    density = DASH if row.dense else f"{100 * (1 - row.sparsity):g} %"
    return [
        density,
        f"{row.lr:g}" + "*" * row.lr_at_edge,
        f"{steps(row):.0f}",
        f"{row.over_seeds('rounds').mean:.0f}",
        megabytes(row.over_seeds("bytes_total").mean, 2),
        accuracy(row),
        *(difference(row, other, row.headline) for other in others),
        str(len(row.runs)),
    ]


def _label(row: Row, group: Sequence[Row]) -> str:
    """Name a row by its rule, where that names one row alone of a density and a group."""
    kind = (row.settings["mask_rule"], row.sparsity, pruned(row.settings))
    same = [other for other in group if (other.settings["mask_rule"], other.sparsity, pruned(other.settings)) == kind]
    return kind[0] + ", prune" * kind[2] if len(same) == 1 else _brief(row.name)


def _brief(name: str) -> str:
    """Leave out what the table's heading says.

    >>> _brief("autoflip, explore.keep_model=true, explore.steps=4")
    'autoflip, explore.steps=4'
    """
    heading = ("phases=explore", "explore.keep_model=true", "explore.keep_model=false")
    return ", ".join(part for part in name.split(", ") if part not in heading)
