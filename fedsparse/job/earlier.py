"""Migrates configurations of earlier versions: renamed keys, targets and values, and defaults of newer keys.

Migration comes before checks and construction, so that an old run folder resumes with bit-equal results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsparse.job.keys import JOBS, SHARED

Place = tuple[Any, ...]  # the keys that lead to a value

_RULES = ("Layers", "Pattern", "RandomK", "Threshold", "TopK")
# by new package and old module, the names that moved
_MOVED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fedsparse.optim": {
        "adam": ("SparseAdam",),
        "fedopt": ("AveragedMomentum", "FedAdagrad", "FedAdam", "FedYogi"),
    },
    "fedsparse.federation.client": {"federation.objective": ("FedProx", "Scaffold")},
    "fedsparse.federation.exchange": {
        "federation.filters": ("feedback", "precision", "sign_flip"),
        "federation.link": ("Link",),
        "federation.rules": _RULES,
        "federation.selection": _RULES,
    },
    "fedsparse.federation.server": {
        "federation.aggregation": ("FedNova", "Robust", "WeightedMean"),
        "federation.robust": ("geometric_median", "krum", "median", "multi_krum", "trimmed_mean"),
        "federation.sampling": ("everyone", "uniform"),
        "federation.topology": ("Flat",),
    },
    "fedsparse.simulation": {
        "federation.artifacts": ("wandb_logger",),
        "federation.client": ("ClientModule",),
        "federation.personal": ("Personal",),
    },
}
# by old name, the new one
TARGETS: Mapping[str, str] = {
    **{
        f"fedsparse.{module}.{name}": f"{package}.{name}"
        for package, modules in _MOVED.items()
        for module, names in modules.items()
        for name in names
    },
    **{
        f"fedsparse.federation.exchange.{name}": "fedsparse.federation.exchange.Exchange"
        for name in ("Masked", "Sparse")
    },
    "fedsparse.federation.aggregation.CoordinateMean": "fedsparse.federation.server.WeightedMean",
    **{
        f"fedsparse.federation.{at}.Plain": "fedsparse.federation.client.NoCorrection" for at in ("client", "objective")
    },
}
# by target, newer keys with the value that gives the earlier behaviour
_SCHEDULES = ("constant", "cosine", "exponential", "step")
KEYS: Mapping[str, Mapping[str, Any]] = {
    "fedsparse.data.partition.classes_per_client": {"even": False},
    **{f"fedsparse.federation.schedule.{name}": {"within": "constant"} for name in _SCHEDULES},
}
# by target, the old and new names of arguments
ARGUMENTS: Mapping[str, Mapping[str, str]] = {"fedsparse.models.text.bert": {"source": "tokenizer"}}
# by target and key, the old and new values
VALUES: Mapping[str, Mapping[str, Mapping[Any, Any]]] = {
    "lightning.Trainer": {"precision": {32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}}
}
# by old key, the new one, also for all keys below it; the longer key first
MOVES: Mapping[str, str] = {
    "optimizer.build": "optimizer",
    "server.optimizer": "server",
    "model.net.source": "model.tokenizer",
    "model.net": "model",
    "data.source": "data",
    "exchange.build.filters.attack.clients": "exchange.attackers",
    "exchange.build.filters.attack.scale": "exchange.attack_scale",
    "exchange.build.filters.feedback.decay": "exchange.feedback",
    "exchange.build.filters.precision.dtype": "exchange.precision",
    "mixing.global_share": "topology.global_mix",
    "exchange.build.rule": "exchange",
    "exchange.build": "exchange",
}
# choices of groups that had one option and no longer exist
CHOICES = tuple(f"{group}=default" for group in ("calibration", "explore", "federation", "head", "mask", "trainer"))
# by old key, a value that is dropped: keys of the exchange now imply the filters
IMPLIED: Mapping[str, str] = {
    "exchange.build.filters.attack._target_": "fedsparse.federation.exchange.sign_flip",
    "exchange.build.filters.feedback._target_": "fedsparse.federation.exchange.feedback",
    "exchange.build.filters.precision._target_": "fedsparse.federation.exchange.precision",
}
_PLAIN = "fedsparse.federation.exchange.Exchange"  # took a rule, which is the target now
_REFERENCE = re.compile(r"(\$\{\s*(?:oc\.select\s*:\s*)?)([\w-]+(?:\.[\w-]+)+)")


def renewed(node: Any) -> Any:
    """Migrate a stored configuration, of nested mappings and lists, to the present names and keys.

    >>> renewed({"_target_": "fedsparse.data.partition.classes_per_client", "nc": 2})["even"]
    False
    >>> renewed({"server": {"lr": 1.0, "optimizer": {"_target_": "torch.optim.SGD", "lr": "${server.lr}"}}})
    {'server': {'lr': 1.0, '_target_': 'torch.optim.SGD'}}
    """
    found = _renamed(node)
    return _moved(found) if isinstance(found, dict) else found


def key_of_now(key: str) -> str | None:
    """Find the new name of an old key; None if it did not move.

    >>> key_of_now("server.optimizer.momentum"), key_of_now("server.lr")
    ('server.momentum', None)
    """
    then = next((then for then in MOVES if f"{key}.".startswith(f"{then}.")), None)
    return None if then is None else MOVES[then] + key.removeprefix(then)


def typed_now(overrides: Sequence[str]) -> list[str]:
    """Migrate the overrides of a stored run, without choices of groups that no longer exist.

    >>> typed_now(["+server.optimizer.nesterov=${server.optimizer.lr}", "head=default"])
    ['+server.nesterov=${server.lr}']
    """
    parts = [override.partition("=") for override in overrides if override not in CHOICES]
    names = [key.lstrip("+~") for key, _, _ in parts]
    return [
        key.removesuffix(name) + (key_of_now(name) or name) + equals + _referring(value)
        for name, (key, equals, value) in zip(names, parts, strict=True)
    ]


def _referring(value: Any) -> Any:
    """Rewrite references to old keys, in a value or a list."""
    if isinstance(value, list):
        return [_referring(one) for one in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE.sub(lambda found: found[1] + (key_of_now(found[2]) or found[2]), value)


def _moved(cfg: dict[str, Any]) -> dict[str, Any]:
    """Move values to their new keys; a value that only referred to its new key is dropped.

    A second value for one key, or one that would replace a key of the job, stays, and is later refused by its old key.
    """
    leaves = _without_implied({place: _referring(value) for place, value in _leaves(cfg, ())})
    moving = {place: there for place in leaves if len(there := _place_of_now(place)) > 1 and there != place}
    kept = {place: value for place, value in leaves.items() if place not in moving}
    moved: dict[Place, Any] = {}
    for place, there in moving.items():
        passed_on = there in kept and leaves[place] == f"${{{'.'.join(map(str, there))}}}"
        if not passed_on:
            moved[place if there in moved or (there in kept and _of_the_job(there)) else there] = leaves[place]
    return _nested(kept | moved)


def _of_the_job(place: Place) -> bool:
    """Whether an argument of a network or data set would replace a key that the job reads."""
    group, key = place[:2]
    return group in ("model", "data") and key in JOBS[group] and key not in SHARED[group]


def _without_implied(leaves: Mapping[Place, Any]) -> dict[Place, Any]:
    """Drop implied values: targets of filters, and the plain exchange where its rule is now the target."""
    implied: dict[Place, Any] = {tuple(key.split(".")): value for key, value in IMPLIED.items()}
    if any(place[:3] == ("exchange", "build", "rule") for place in leaves):
        target, is_partial = (("exchange", "build", key) for key in ("_target_", "_partial_"))
        implied |= {target: _PLAIN, is_partial: leaves.get(target) == _PLAIN}
    return {place: value for place, value in leaves.items() if place not in implied or value != implied[place]}


def _place_of_now(place: Place) -> Place:
    """Find the new place of a value."""
    for then, now in ((then.split("."), now.split(".")) for then, now in MOVES.items()):
        if list(place[: len(then)]) == then:
            return (*now, *place[len(then) :])
    return place


def _leaves(node: Mapping[Any, Any], above: Place) -> Iterator[tuple[Place, Any]]:
    """Iterate over the values of nested mappings, each with its place; an empty mapping is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _nested(leaves: Mapping[Place, Any]) -> dict[str, Any]:
    """Build nested mappings from values by place."""
    tree: dict[str, Any] = {}
    for (*above, last), value in leaves.items():
        node = tree
        for key in above:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[last] = value
    return tree


def _renamed(node: Any) -> Any:
    """Rename targets, with their arguments and values, and add newer keys."""
    if isinstance(node, list):
        return [_renamed(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    result = {key: _renamed(value) for key, value in node.items()}
    if isinstance(target := result.get("_target_"), str):
        result["_target_"] = TARGETS.get(target, target)
        names_now = ARGUMENTS.get(result["_target_"], {})
        result = {
            **KEYS.get(result["_target_"], {}),
            **{names_now.get(key, key): result[key] for key in result},
        }
        for key, names in VALUES.get(result["_target_"], {}).items():
            if isinstance(value := result.get(key), int | str):
                result[key] = names.get(value, value)
    return result
