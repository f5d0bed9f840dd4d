"""What a row is compared with: dense training that shares all but the mask, what is sent and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from fedsparse.analysis.names import CHOSEN, LABEL, LINE, PHASES, under, usual
from fedsparse.analysis.table import Row

_TRAINABLE = "model.trainable"
# what a mask or an exchange brings with it, or where runs are written down
_FREE = (
    *("mask_rule", "sparsity", "mask", "experiment", _TRAINABLE, "exchange", "aggregation", LABEL, LINE),
    *("calibration", "phases.calibrate", "phases.explore", "explore", PHASES),
)
_KEPT = ("calibration.head_steps", "calibration.head_lr")  # the head that all start from
_MEANS = ("WeightedMean", "CoordinateMean")  # one mean, where all send everything; only how coordinates divide differs
_MOST = 4  # keys that are listed


def dense_of(row: Row, table: Sequence[Row]) -> Row | None:
    """Find dense training that a row's difference can be due to the mask or the exchange from; None without any.

    It shares data, model, partition, rounds, optimizer, objective, head, server and average. Of several it is the one
    that trains all, then the one most alike.
    """
    own = protocol(row)
    dense = [other for other in table if other.dense and protocol(other) == own]
    return min(dense, key=lambda other: _distance(row, other), default=None)


def nearest(row: Row, table: Sequence[Row]) -> tuple[Row, list[str]] | None:
    """Find the dense row that comes closest to a row without a reference, and the keys in which it differs.

    Returns:
        None where the row has a reference, or no dense row has its data, model and partition.

    """
    own = protocol(row)
    same = [other for other in table if other.dense and (*other.task, other.partition) == (*row.task, row.partition)]
    apart = [(other, sorted({key for key, _ in own.items() ^ protocol(other).items()})) for other in same]
    found = min(apart, key=lambda one: (len(one[1]), one[0].name), default=None)
    return found if found and found[1] else None


def differing(keys: Sequence[str]) -> str:
    """List keys, the first few of them; of several of one group the group.

    >>> differing(["a", "b", "c", "d", "e", "f"]), differing(["head.init", "server._target_", "server.lr"])
    ('a, b, c, d and 2 more', 'head.init, server')
    """
    groups = [key.split(".")[0] for key in keys]
    whole = {group for group in groups if group in CHOSEN and groups.count(group) > 1}
    keys = list(dict.fromkeys(g if g in whole else key for g, key in zip(groups, keys, strict=True)))
    more = f" and {len(keys) - _MOST} more" if len(keys) > _MOST else ""
    return ", ".join(keys[:_MOST]) + more


def protocol(row: Row, without: Sequence[str] = ()) -> dict[str, str]:
    """Keep what two rows must share so that their difference can be read.

    Args:
        row: the row.
        without: further keys that may differ.

    """
    kept = {
        key: value for key, value in row.settings.items() if under(key, _KEPT) or not under(key, (*_FREE, *without))
    }
    kept = {key: value for key, value in kept.items() if not usual(key, value)}
    phases = ", ".join(name for name in row.settings.get(PHASES, "").split(", ") if name not in ("", "explore"))
    head_start = {"explore.keep_model": "true"} if row.head_start and "explore.keep_model" not in without else {}
    return kept | _average(row) | _attack(row) | head_start | ({PHASES: phases} if phases else {})


def _average(row: Row) -> dict[str, str]:
    """Name the average; the mean over who sent a coordinate is the mean over all where all send all."""
    target = row.settings.get("aggregation._target_", _MEANS[0])
    if target.rsplit(".", 1)[-1] in _MEANS:
        return {}
    return {key: value for key, value in row.settings.items() if under(key, ("aggregation",))}


def _attack(row: Row) -> dict[str, str]:
    """Name an attack, which an exchange carries and no dense run of others has."""
    attackers = row.settings.get("exchange.attackers", "null")
    scale = row.settings.get("exchange.attack_scale", "")
    attacked = {"exchange.attackers": attackers, "exchange.attack_scale": scale}
    return {} if attackers in ("null", "0") else attacked


def _distance(row: Row, other: Row) -> tuple[bool, int, str]:
    """Order dense rows: those that train all first, then by the number of settings that differ, then by name."""
    partial = other.settings.get(_TRAINABLE, "all") != "all"
    return partial, len(set(row.settings.items()) ^ set(other.settings.items())), other.name
