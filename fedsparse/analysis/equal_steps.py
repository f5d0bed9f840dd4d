"""Mask rules at equal client steps, where some runs explore first: what exploring gains, and its head start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedsparse.analysis.page import Section, Table
from fedsparse.analysis.statistics import DASH
from fedsparse.analysis.table import Row, partitions
from fedsparse.analysis.tables import difference

_STEPS, _ACCURACY = "client_steps", "test/acc"
_REFERENCES = ("dense", "random")
_FEDERATION = ("clients_per_round", "num_clients", "local_steps")
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
    "row has about the same client steps in all (compared are rows that agree within one round of learning), so that "
    "what prepares longer learns for fewer rounds. Mean over seeds ± half the 95 % interval; differences are paired by "
    "seed. Bold, ▲ or ▼: the interval lies above or below 0. "
)
_START = (
    "AutoFLIP's public code goes from client to client in one model while it explores, and keeps that model: a head "
    "start by training in turn. Here every rule has it, and dense training too; 'gained by the head start' is the "
    "difference to the same rule without it, at the same client steps."
)


def section(table: Sequence[Row]) -> Iterable[Section]:
    """Compare at equal client steps, if clients of any run explored and all of them counted their steps."""
    shown = [row for row in table if steps(row) and not row.exchange]
    if not any(row.explored for row in shown):
        return []
    plain = [_table(part, shown, head_start=False) for part in partitions(shown)]
    started = [_table(part, shown, head_start=True) for part in partitions(shown)]
    parts = [Section("Equal client steps", _TEXT, [one for one in plain if one.body])]
    more = [one for one in started if one.body]
    return [*parts, Section("Head start", _START, more)] if more else parts


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
    alike = [other for other in table if other is not row and _alike(other, row, rule) and other.head_start == start]
    near = [other for other in alike if abs(steps(other) - steps(row)) <= of_round(other)]
    return min(near, key=lambda other: (abs(steps(other) - steps(row)), _apart(row, other), other.name), default=None)


def _apart(row: Row, other: Row) -> int:
    """Count the settings in which two rows differ."""
    return len(set(row.settings.items()) ^ set(other.settings.items()))


def of_round(row: Row) -> float:
    """Client steps of a learning round: clients of a round times their local steps, 0 where steps are not given."""
    chosen, clients, local = (row.settings.get(f"federation.{key}", "") for key in _FEDERATION)
    try:
        count = max(1, int(float(chosen) * int(clients) + 0.5)) if "." in chosen else int(chosen)
        return count * int(local)
    except ValueError:
        return 0.0


def _alike(other: Row, row: Row, rule: str) -> bool:
    """Whether a row is of a rule and of the same task, as sparse as the other unless the rule is dense."""
    same = all(other.settings.get(key) == row.settings.get(key) for key in ("data", "model"))
    named = other.settings["mask_rule"] == rule and other.partition == row.partition
    return same and named and (rule == "dense" or other.sparsity == row.sparsity)


def _table(part: str, table: Sequence[Row], head_start: bool) -> Table:
    """Lay out a partition: dense, then by density from the most, then by accuracy."""
    rows = [row for row in table if row.partition == part and row.head_start == head_start]
    order = sorted(rows, key=lambda row: (not row.dense, row.sparsity, -row.over_seeds(_ACCURACY).mean, row.name))
    head = [*_HEAD, *["gained by the head start, points"] * head_start, "seeds"]
    return Table(head, [_cells(row, table, head_start) for row in order], part)


def _cells(row: Row, table: Sequence[Row], head_start: bool) -> list[str]:
    """Write a row; a rule is not compared with itself."""
    others = [None if row.settings["mask_rule"] == rule else counterpart(row, table, rule) for rule in _REFERENCES]
    if head_start:
        others.append(counterpart(row, table, row.settings["mask_rule"], head_start=False))
    density = DASH if row.dense else f"{100 * (1 - row.sparsity):g} %"
    return [
        row.settings["mask_rule"] if _only(row, table) else _short(row.name),
        density,
        f"{row.lr:g}" + "*" * row.lr_at_edge,
        f"{steps(row):.0f}",
        f"{row.over_seeds('rounds').mean:.0f}",
        f"{row.over_seeds('bytes_total').mean / 1e6:.2f}",
        row.over_seeds(_ACCURACY).percent(),
        *(difference(row, other, _ACCURACY) for other in others),
        str(len(row.runs)),
    ]


def _short(name: str) -> str:
    """Leave out what the table's heading says.

    >>> _short("autoflip, explore.keep_model=true, explore.steps=4")
    'autoflip, explore.steps=4'
    """
    said = ("phases=explore", "explore.keep_model=true", "explore.keep_model=false")
    return ", ".join(part for part in name.split(", ") if part not in said)


def _only(row: Row, table: Sequence[Row]) -> bool:
    """Whether a rule names one row alone of a partition, density and start."""
    same = [r for r in table if _alike(r, row, row.settings["mask_rule"]) and r.head_start == row.head_start]
    return len([r for r in same if r.sparsity == row.sparsity]) == 1
