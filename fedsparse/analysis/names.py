"""Names of rows: the mask rule, and whatever else differs between the runs at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsparse.analysis.exchange import exchange_label, fraction_of, line_label
from fedsparse.analysis.folders import Run

Settings = Mapping[str, str]

# what may differ between runs that are averaged, or chosen among
_SWEPT = ("seed", "optimizer.lr", "sparsity.ratio")
_IDLE = (
    "exchange._target_",  # says what the other keys of the exchange say
    "exchange._partial_",
    "link",  # moves no bit
    "trajectory",
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
    "federation.compile",
)
# a dense run reads none of these
_OF_MASKS = ("mask_rule", "sparsity", "mask")
_OF_PHASES = ("phases", "explore")
_PREPARED = ("head", "calibrate", "learn")  # phases that all runs may have
# keys of a group are compared among the runs of one option, for they come with it; others among those of an experiment
# and a data set
_OPTIONS = ("mask_rule", "partition", "data", "model", "experiment", "method")
_OPTION = {name: name for name in _OPTIONS} | {"sparsity": "mask_rule", "mask": "mask_rule"}
_OF_METHODS = ("lora", "model.local", "exchange", "merging", "server")  # what files of conf/method set
# what a sparse exchange consists of: its label says most of it, so only those that lie on one line are compared
_OF_EXCHANGES = ("exchange", "aggregation")
_FRACTIONS = ("exchange.fraction", "exchange.percentage")
LABEL, _LINE = "label of the sparse exchange", "its line"  # no keys of a configuration
PHASES = "phases"  # the key that names those beyond the usual
_TRAINABLE = "model.trainable"
_ALWAYS = "partition.beta"  # a Dirichlet partition without it says nothing


def settings(run: Run) -> dict[str, str]:
    """Keep what two runs must share to be averaged over seeds, or to compete as learning rates of one row."""
    dropped = _SWEPT + _IDLE + (_OF_MASKS if run.summary["mask_rule"] == "dense" else ())
    dropped += _FRACTIONS if exchange_label(run.summary) and fraction_of(run.summary) else ()  # the label says it
    kept = {key: value for key, value in run.config.items() if not _under(key, dropped)}
    if not _phases(run):
        kept = {key: value for key, value in kept.items() if not _usual(key, value)}
    choices = {key: str(run.summary[key]) for key in ("mask_rule", "partition")}
    return kept | choices | {"sparsity": f"{run.sparsity:g}"} | _exchange(run) | _phases(run)


def _usual(key: str, value: str) -> bool:
    """Whether a key says nothing where head, calibration and learning are all: options of exploring, and defaults."""
    return _under(key, ("explore",)) or (_under(key, ("phases",)) and (value.startswith("${") or value == "true"))


def _phases(run: Run) -> dict[str, str]:
    """Name the phases beyond head, calibration and learning; nothing for a run without any."""
    keys = [key.split(".") for key in run.config if key.startswith("phases.")]
    names = dict.fromkeys(parts[1] for parts in keys if parts[1] not in _PREPARED and len(parts) > 2)
    return {PHASES: ", ".join(names)} if names else {}


def _exchange(run: Run) -> dict[str, str]:
    """Keep the label of a sparse exchange, and what it shares with those on its line; nothing for other exchanges."""
    label, chosen = exchange_label(run.summary), run.summary.get("exchange")
    if label:
        return {LABEL: label, _LINE: line_label(run.summary)}
    return {"exchange": chosen} if chosen else {}


def _under(key: str, keys: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def labels(groups: Sequence[Settings]) -> list[tuple[str, str]]:
    """Name each group of runs so that no two share a name, a partition and a sparsity.

    Args:
        groups: settings of each group, all different.

    Returns:
        Name and partition of each.

    """
    differing = _differing(groups)
    return [(_name(group, differing), _partition(group, differing)) for group in groups]


def _differing(groups: Sequence[Settings]) -> set[tuple[str, str]]:
    """Find (key, option it comes with) where groups of that option disagree, or some have no such key."""
    shared: dict[tuple[str, str], list[str]] = {}
    sizes: dict[str, int] = {}
    for group in groups:
        for option in {_option(key, group) for key in (*group, "experiment", *_OF_EXCHANGES)}:
            sizes[option] = sizes.get(option, 0) + 1
        for key, value in group.items():
            shared.setdefault((key, _option(key, group)), []).append(value)
    several = {(key, "") for key in _OPTIONS if len({group[key] for group in groups}) > 1}
    return several | {place for place, v in shared.items() if len(set(v)) > 1 or len(v) < sizes[place[1]]}


def _option(key: str, group: Settings) -> str:
    first = key.split(".")[0]
    if group["method"] and _under(key, _OF_METHODS):
        return f"method={group['method']}"
    if first in _OF_EXCHANGES:
        return f"experiment={group['experiment']}, exchange={group.get(_LINE, '')}"
    if first in _OF_PHASES:
        rule = f"mask_rule={group['mask_rule']}"
        return rule if key == PHASES else f"{rule}, phases={group.get(PHASES, '')}"
    chosen = _OPTION.get(first)
    return f"{chosen}={group[chosen]}" if chosen else f"experiment={group['experiment']}, data={group['data']}"


def _name(group: Settings, differing: set[tuple[str, str]]) -> str:
    """Write the rule, the sparse exchange (alone if all trains), then the options and keys in which others differ."""
    dense, label = group["mask_rule"] == "dense", group.get(LABEL, "")
    alone = dense and group.get(_TRAINABLE) == "head"
    first = "head alone" if alone else group["mask_rule"]
    first = ", ".join([first] * (not label or alone or not dense) + [label] * bool(label))
    choices = [group[key] for key in ("experiment", "method", "data", "model") if (key, "") in differing and group[key]]
    told = alone or (group["method"] and ("method", "") in differing) or group.get(_TRAINABLE, "all") == "all"
    shown = [] if told else [f"trainable={group[_TRAINABLE]}"]
    skipped = {*_OPTIONS, "sparsity", _TRAINABLE, LABEL, _LINE}
    keys = [key for key in sorted(group) if key not in skipped and not key.startswith("partition.")]
    shown += [_shown(key, group[key]) for key in keys if (key, _option(key, group)) in differing]
    return ", ".join([first, *choices, *shown])


def _partition(group: Settings, differing: set[tuple[str, str]]) -> str:
    """Write the partition with the parameters that tell it from others of its kind: dirichlet(0.1)."""
    keys = [key for key in sorted(group) if key.startswith("partition.")]
    always = () if group["partition"][-1].isdigit() else (_ALWAYS,)  # dirichlet01 says it in its name
    shown = [group[key] for key in keys if key in always or (key, _option(key, group)) in differing]
    return group["partition"] + (f"({', '.join(shown)})" if shown else "")


def _shown(key: str, value: str) -> str:
    """Write a key and its value; a class by its own name.

    >>> _shown("optimizer._target_", "torch.optim.Adam")
    'optimizer=Adam'

    """
    target = key.endswith("._target_")
    return f"{key.removesuffix('._target_')}={value.rsplit('.', 1)[-1] if target else value}"
