"""Finds keys of a configuration that no code reads; ``+key=value`` and a user's YAML files can add them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsparse.job import lean, shipped, trust
from fedsparse.job.advice import no_key
from fedsparse.job.earlier import MOVES
from fedsparse.job.keys import JOBS, taken
from fedsparse.job.targets import imported

FREE = ("phases", "callbacks", "logger", *shipped.WHOLE)  # their keys are names that the user chooses


def check_keys(cfg: DictConfig, choices: Mapping[str, str | None]) -> None:
    """Refuse keys that no group or section has, by the YAML files alone.

    Args:
        cfg: the configuration.
        choices: option chosen of each group; the keys of a user's option are not checked.

    Raises:
        ValueError: one line with the first of them and a suggestion.

    """
    written = OmegaConf.to_yaml(cfg)
    unknown = [key for key in _unknown(cfg, choices) if f"${{{key}}}" not in written]  # no other key refers to it
    moved = [then for then in MOVES if OmegaConf.is_dict(OmegaConf.select(cfg, then))]
    if found := [*unknown, *moved]:
        raise ValueError(_line(found, choices))


def check_taken(cfg: DictConfig, choices: Mapping[str, str | None]) -> None:
    """Refuse keys beside a ``_target_`` that it does not take; this imports the targets, and with them Lightning.

    Args:
        cfg: the configuration.
        choices: option chosen of each group.

    Raises:
        ValueError: one line with the first of them and a suggestion; or a ``_target_`` cannot be imported.

    """
    plain = OmegaConf.to_container(cfg)
    targets = {node["_target_"] for _, node in trust.nodes(plain) if isinstance(node, dict) and "_target_" in node}
    if targets <= trust.shipped().arguments.keys():  # code of one's own may use all of torchmetrics
        lean.import_torchmetrics()
    if found := list(_not_taken(plain, "")):
        raise ValueError(_line(found, choices))


def _line(keys: Sequence[str], choices: Mapping[str, str | None]) -> str:
    """Write the error line of the first of some keys that nothing reads; an experiment's own were not typed."""
    name, group = choices.get("experiment"), keys[0].partition(".")[0]
    own = shipped.keys("experiment", name) if name in shipped.options("experiment") else {}
    if keys[0] not in own:
        return no_key(keys[0])
    listed = [key for key in keys if key in own and key.startswith(f"{group}.")]
    option = f"{group}={choices[group]}" if group in choices else "this configuration"
    without = " ".join(f"~{key}" for key in listed)
    return f"experiment={name} sets {' and '.join(listed)}, which {option} does not have; add {without}"


def _unknown(cfg: DictConfig, choices: Mapping[str, str | None]) -> Iterator[str]:
    """Find keys that no option of their group has; ``_not_taken`` checks nodes with a ``_target_``."""
    yield from (str(key) for key in cfg if key not in shipped.groups() and key not in shipped.main())
    for section, known in shipped.sections().items():
        if "_target_" not in known:
            yield from (f"{section}.{key!s}" for key in cfg.get(section) or {} if key not in known)
    for group in shipped.groups():
        node, chosen = cfg.get(group), choices.get(group, shipped.defaults().get(group))
        if isinstance(node, DictConfig) and "_target_" not in node and group not in FREE:
            users = chosen is not None and chosen not in shipped.options(group)
            yield from (f"{group}.{key!s}" for key in node if not users and not _has(group, str(key)))


def _has(group: str, key: str) -> bool:
    return any(key in shipped.keys(group, option) for option in shipped.options(group))


def _not_taken(node: Any, path: str) -> Iterator[str]:
    """Find keys beside a ``_target_`` that are neither its arguments nor read by the job."""
    if isinstance(node, list):
        for place, value in enumerate(node):
            yield from _not_taken(value, f"{path}{place}.")
    if isinstance(node, dict):
        target, named = node.get("_target_"), None
        if isinstance(target, str) and "${" not in target:
            imported(f"{path}_target_", target)
            named = taken(target)
        known = None if named is None else {*named, *JOBS.get(path.rstrip("."), ())}
        for key, value in node.items():
            if known is not None and not str(key).startswith("_") and key not in known:
                yield f"{path}{key}"
            yield from _not_taken(value, f"{path}{key}.")
