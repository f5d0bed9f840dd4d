"""Lists the shipped YAML files: groups, their options, and the options' keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml


def conf_dir() -> Path:
    """Find the folder of the YAML files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


WHOLE = ("experiment", "method")  # groups whose options set keys of all groups


@cache
def groups() -> tuple[str, ...]:
    """List the config groups."""
    return tuple(sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"))


@cache
def options(group: str) -> tuple[str, ...]:
    """List the options of a config group."""
    return tuple(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))


@cache
def main() -> dict[str, Any]:
    """Read ``train.yaml``."""
    return _read(conf_dir() / "train.yaml")


@cache
def sections() -> dict[str, dict[str, Any]]:
    """Read the sections of ``train.yaml`` that are no group, each as dotted keys with values."""
    nodes = {key: node for key, node in main().items() if isinstance(node, dict) and key != "hydra"}
    return {key: dict(_flat(node, "")) for key, node in nodes.items()}


@cache
def defaults() -> dict[str, str | None]:
    """Read the default option of each group."""
    return {key: option for entry in main()["defaults"] if isinstance(entry, dict) for key, option in entry.items()}


@cache
def keys(group: str, option: str) -> dict[str, Any]:
    """Read the dotted keys of an option with their values, also those of the options that it includes."""
    node = dict(_read(conf_dir() / group / f"{option}.yaml"))
    parts = [str(part).removesuffix("@_here_") for part in node.pop("defaults", ()) if str(part).endswith("@_here_")]
    folder = option.rpartition("/")[0]
    found = dict(_flat(node, ""))
    for part in reversed(parts):  # a later one overrides
        found |= {key: value for key, value in keys(group, f"{folder}/{part}".lstrip("/")).items() if key not in found}
    return found


@cache
def settable() -> tuple[str, ...]:
    """List all groups, and all keys of any option that may be set."""
    names = [key for key in main() if key not in ("defaults", "hydra")] + list(groups())
    names += [f"{section}.{key}" for section, values in sections().items() for key in values]
    chosen = [group for group in groups() if group not in WHOLE]
    names += [f"{group}.{key}" for group in chosen for option in options(group) for key in keys(group, option)]
    return tuple(dict.fromkeys(key for key in names if "._" not in key))


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    assert isinstance(content, dict)
    return content


def _flat(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield f"{path}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
