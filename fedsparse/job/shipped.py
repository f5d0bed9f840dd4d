"""The shipped YAML files: groups, options, and the keys that an option has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml


def conf_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


@cache
def groups() -> tuple[str, ...]:
    """Names of the config groups."""
    return tuple(sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"))


@cache
def options(group: str) -> tuple[str, ...]:
    """Options of a config group."""
    return tuple(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))


@cache
def main() -> dict[str, Any]:
    """What ``train.yaml`` holds."""
    return _read(conf_dir() / "train.yaml")


@cache
def sections() -> dict[str, dict[str, Any]]:
    """Parts of ``train.yaml`` that are no choice, each with its dotted keys and their values."""
    own = {key: node for key, node in main().items() if isinstance(node, dict) and key != "hydra"}
    return {key: dict(_flat(node, "")) for key, node in own.items()}


@cache
def defaults() -> dict[str, str | None]:
    """Option of each group that is taken where none is typed."""
    return {key: option for entry in main()["defaults"] if isinstance(entry, dict) for key, option in entry.items()}


@cache
def keys(group: str, option: str) -> dict[str, Any]:
    """Dotted keys of an option with their values: its own first, then those of the parts that it is made of."""
    node = dict(_read(conf_dir() / group / f"{option}.yaml"))
    parts = [str(part).removesuffix("@_here_") for part in node.pop("defaults", ()) if str(part).endswith("@_here_")]
    folder = option.rpartition("/")[0]
    found = dict(_flat(node, ""))
    for part in reversed(parts):  # the later one counts
        found |= {key: value for key, value in keys(group, f"{folder}/{part}".lstrip("/")).items() if key not in found}
    return found


@cache
def settable() -> tuple[str, ...]:
    """Every group, and every key that some option has and a person may set."""
    found = [key for key in main() if key not in ("defaults", "hydra")] + list(groups())
    found += [f"{section}.{key}" for section, held in sections().items() for key in held]
    chosen = [group for group in groups() if group != "experiment"]
    found += [f"{group}.{key}" for group in chosen for option in options(group) for key in keys(group, option)]
    return tuple(dict.fromkeys(key for key in found if "._" not in key))


def _read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    assert isinstance(found, dict)
    return found


def _flat(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield f"{path}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
