"""Names of rows: the mask rule, then the options and typed keys in which the runs at hand differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsparse.analysis.exchange import exchange_label, fraction_of, line_label
from fedsparse.analysis.folders import Run

Settings = Mapping[str, str]
Differing = set[tuple[str, str]]  # (key, what it is compared within)

# what may differ between runs that are averaged, or chosen among
_SWEPT = ("seed", "optimizer.lr", "sparsity.ratio")
_IDLE = (
    "exchange._target_",  # says what the other keys of the exchange say
    "link",  # moves no bit
    "evaluation",  # more figures of the same training
    "trajectory",
    "explore.save",
    "federation.store",
    "trainer.max_time",
    "resume",
    "logger",
    "pictures",
    "federation.checkpoint_every",
    "calibration.cache",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "data.stream",
    "data.workers",
    "federation.cohort",
    "model.cohort",
    "model.image_side",  # data.size refers to it, and older runs lack it
    "federation.compile",
    "federation.channels_last",
)
# a dense run reads none of these
_OF_MASKS = ("mask_rule", "sparsity", "mask")
_OF_PHASES = ("phases", "explore")
_PREPARED = ("head", "calibrate", "learn")  # phases that all runs may have
# keys of a group are compared among the runs of one option, for they come with it; others among those of an experiment
# and a data set
_OPTIONS = ("mask_rule", "partition", "data", "model", "experiment", "method")
_OPTION = {name: name for name in _OPTIONS} | {"sparsity": "mask_rule", "mask": "mask_rule"}
# groups whose chosen option says what its keys say; the options of the first ones need no group beside them
_ALONE = ("server", "aggregation", "objective", "optimizer", "merging")
CHOSEN = (*_ALONE, "schedule", "sampling", "topology", "mixing", "lora", "client", "callbacks")
_BLANK = ("none", "default")  # options that say nothing without their group
_SPARSITY = "option of sparsity"  # no key of a configuration; of the usual ones the fraction says all
_OF_METHODS = ("lora", "model.local", "exchange", "merging", "server")  # what files of conf/method set
# what a sparse exchange consists of: its label says most of it, so only those that lie on one line are compared
_OF_EXCHANGES = ("exchange", "aggregation")
_FRACTIONS = ("exchange.fraction", "exchange.percentage")
LABEL, LINE = "label of the sparse exchange", "its line"  # no keys of a configuration
PHASES = "phases"  # the key that names those beyond the usual
_TRAINABLE = "model.trainable"
_ALWAYS = "partition.beta"  # a Dirichlet partition without it says nothing
_MODE, _PRUNE = "sparsity.mode", "prune"


@dataclass(frozen=True)
class Group:
    """Runs of one row, as far as its name goes.

    Attributes:
        keys: what they share, and the chosen options of groups.
        typed: keys and groups that were typed for any of them; None where that is not stored.

    """

    keys: Settings
    typed: frozenset[str] | None

    @classmethod
    def of(cls, shared: Settings, runs: Sequence[Run]) -> Group:
        """Collect options and what was typed; of runs that are the same by other options the first one's count."""
        typed = [run.typed for run in runs]
        known = [keys for keys in typed if keys is not None]
        return cls({**shared, **_options(runs[0])}, frozenset().union(*known) if len(known) == len(typed) else None)


def settings(run: Run) -> dict[str, str]:
    """Keep what two runs must share to be averaged over seeds, or to compete as learning rates of one row."""
    dropped = _SWEPT + _IDLE + (_OF_MASKS if run.summary["mask_rule"] == "dense" else ())
    dropped += _FRACTIONS if exchange_label(run.summary) and fraction_of(run.summary) else ()  # the label says it
    kept = {key: value for key, value in run.config.items() if not under(key, dropped) and not _partial(key)}
    if not _phases(run):
        kept = {key: value for key, value in kept.items() if not usual(key, value)}
    choices = {key: str(run.summary[key]) for key in ("mask_rule", "partition")}
    return kept | choices | {"sparsity": f"{run.sparsity:g}"} | _exchange(run) | _phases(run)


def _options(run: Run) -> dict[str, str]:
    """Find the options that names may say; older folders keep some in the summary, or nowhere."""
    stored = {group: run.options.get(group) or run.summary.get(group) for group in CHOSEN}
    found = {group: option for group, option in stored.items() if isinstance(option, str)}
    sparsity = "" if run.summary["mask_rule"] == "dense" else run.options.get("sparsity", "")
    return found | ({} if re.fullmatch(r"(s\d+)?", sparsity) else {_SPARSITY: sparsity})


def _partial(key: str) -> bool:
    return key.endswith("._partial_")  # comes with the class


def usual(key: str, value: str) -> bool:
    """Whether a key says nothing where head, calibration and learning are all: options of exploring, and defaults."""
    return under(key, ("explore",)) or (under(key, ("phases",)) and (value.startswith("${") or value == "true"))


def _phases(run: Run) -> dict[str, str]:
    """Name the phases beyond head, calibration and learning; nothing for a run without any."""
    keys = [key.split(".") for key in run.config if key.startswith("phases.")]
    names = dict.fromkeys(parts[1] for parts in keys if parts[1] not in _PREPARED and len(parts) > 2)
    return {PHASES: ", ".join(names)} if names else {}


def _exchange(run: Run) -> dict[str, str]:
    """Keep the label of a sparse exchange, and what it shares with those on its line; nothing for other exchanges."""
    label, chosen = exchange_label(run.summary), run.summary.get("exchange")
    if label:
        return {LABEL: label, LINE: line_label(run.summary)}
    return {"exchange": chosen} if chosen else {}


def under(key: str, keys: Sequence[str]) -> bool:
    """Whether a dotted key is one of some, or lies within one."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def labels(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Name each group of runs so that no two share a name, a partition and a sparsity.

    A name says the options and the typed keys in which groups differ; only where such names would clash, or where
    nobody stored what was typed, it says whatever differs.

    Args:
        groups: their settings are all different.

    Returns:
        Name and partition of each.

    """
    differing = _differing(groups)
    names = [_name(group, differing) for group in groups]
    places = [(_partition(group, differing), group.keys["sparsity"]) for group in groups]
    for same in _clashes(names, places):
        apart = _differing([groups[i] for i in same])
        more = [_rest(groups[i], apart, every=True) for i in same]
        for i, parts in zip(same, more, strict=True):
            names[i] += [part for part in parts if part not in names[i]]
    for same in _clashes(names, places):
        for number, i in enumerate(same[1:], 2):
            names[i] = [*names[i][:-1], f"{names[i][-1]} ({number})"]
    return [(", ".join(name), place) for name, (place, _) in zip(names, places, strict=True)]


def _clashes(names: Sequence[Sequence[str]], places: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Find the groups that share a name, a partition and a sparsity."""
    found: dict[tuple, list[int]] = {}
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        found.setdefault((*name, place), []).append(i)
    return [same for same in found.values() if len(same) > 1]


def _differing(groups: Sequence[Group]) -> Differing:
    """Find (key, option it comes with) where groups of that option disagree, or some have no such key."""
    shared: dict[tuple[str, str], list[str]] = {}
    sizes: dict[str, int] = {}
    for keys in (group.keys for group in groups):
        within = (*keys, "experiment", *_OF_EXCHANGES, *(f"{group}." for group in CHOSEN))
        for option in {_option(key, keys) for key in within}:
            sizes[option] = sizes.get(option, 0) + 1
        for key, value in keys.items():
            shared.setdefault((key, _option(key, keys)), []).append(value)
    several = {(key, "") for key in _OPTIONS if len({group.keys[key] for group in groups}) > 1}
    return several | {place for place, v in shared.items() if len(set(v)) > 1 or len(v) < sizes[place[1]]}


def _option(key: str, keys: Settings) -> str:
    """Say what a key is compared within: keys of a group among those who chose the same option of it."""
    first = key.split(".")[0]
    chosen = keys.get(_SPARSITY if first == "sparsity" else first, "") if "." in key else ""
    of_group = f", {first}={chosen}" if chosen and (first in CHOSEN or first == "sparsity") else ""
    return _within(key, first, keys) + of_group


def _within(key: str, first: str, keys: Settings) -> str:
    if keys["method"] and under(key, _OF_METHODS):
        return f"method={keys['method']}"
    if first in _OF_EXCHANGES:
        return f"experiment={keys['experiment']}, exchange={keys.get(LINE, '')}"
    if first in _OF_PHASES:
        rule = f"mask_rule={keys['mask_rule']}"
        return rule if key == PHASES else f"{rule}, phases={keys.get(PHASES, '')}"
    chosen = _OPTION.get("sparsity" if key == _SPARSITY else first)
    return f"{chosen}={keys[chosen]}" if chosen else f"experiment={keys['experiment']}, data={keys['data']}"


def _name(group: Group, differing: Differing) -> list[str]:
    """Write the rule, the sparse exchange (alone if all trains), then the options and keys in which others differ."""
    keys = group.keys
    dense, label = keys["mask_rule"] == "dense", keys.get(LABEL, "")
    alone = dense and keys.get(_TRAINABLE) == "head"
    first = ["head alone" if alone else keys["mask_rule"], *[_PRUNE] * pruned(keys)]
    first = first * (not label or alone or not dense) + [label] * bool(label)
    choices = [keys[key] for key in ("experiment", "method", "data", "model") if (key, "") in differing and keys[key]]
    told = alone or (keys["method"] and ("method", "") in differing) or keys.get(_TRAINABLE, "all") == "all"
    shown = [] if told else [f"trainable={keys[_TRAINABLE]}"]
    return [*first, *choices, *shown, *_rest(group, differing)]


def _rest(group: Group, differing: Differing, every: bool = False) -> list[str]:
    """Write the keys in which others differ, and unless ``every`` only those that were typed."""
    skipped = {*_OPTIONS, "sparsity", _TRAINABLE, LABEL, LINE, _MODE}
    keys = [key for key in sorted(group.keys) if key not in skipped and not key.startswith("partition.")]
    told = [key for key in keys if (key, _option(key, group.keys)) in differing and (every or _typed(key, group))]
    return [_shown(key, group.keys[key]) for key in sorted(told, key=lambda key: "." in key)]


def _typed(key: str, group: Group) -> bool:
    """Whether a key or something within it was typed, or a key that it lies within; a typed option is not its keys."""
    if group.typed is None:
        return True
    name = "sparsity" if key == _SPARSITY else key
    within = [typed for typed in group.typed if typed not in CHOSEN and name.startswith(f"{typed}.")]
    return name in group.typed or bool(within) or any(typed.startswith(f"{name}.") for typed in group.typed)


def pruned(keys: Settings) -> bool:
    """Whether what does not train is zero."""
    return keys["mask_rule"] != "dense" and keys.get(_MODE) == _PRUNE


def _partition(group: Group, differing: Differing) -> str:
    """Write the partition with the parameters that tell it from others of its kind: dirichlet(0.1)."""
    keys = group.keys
    parameters = [key for key in sorted(keys) if key.startswith("partition.")]
    always = () if keys["partition"][-1].isdigit() else (_ALWAYS,)  # dirichlet01 says it in its name
    shown = [keys[key] for key in parameters if key in always or (key, _option(key, keys)) in differing]
    return keys["partition"] + (f"({', '.join(shown)})" if shown else "")


def _shown(key: str, value: str) -> str:
    """Write a key and its value; an option that says enough alone, and a class by its own name.

    >>> _shown("optimizer._target_", "torch.optim.Adam"), _shown("server", "fedadam"), _shown("objective", "none")
    ('optimizer=Adam', 'fedadam', 'objective=none')

    """
    if key in (*_ALONE, _SPARSITY) and value not in _BLANK:
        return value
    target = key.endswith("._target_")
    return f"{key.removesuffix('._target_')}={value.rsplit('.', 1)[-1] if target else value}"
