"""Files of a run folder as plain data: nothing in them is executed, and a damaged one says so in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # plain data only, read in C where that was built
# a stored YAML file holds at most this much, whoever wrote it; a configuration has 8 kB, 700 events and 6 levels
BYTES, EVENTS, DEPTH = 2**20, 20_000, 50


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Give nested mappings as dotted keys, with the values as text.

    >>> flatten({"model": {"trainable": "all", "local": []}})
    {'model.trainable': 'all', 'model.local': '[]'}

    """
    if isinstance(tree, Mapping) and tree:
        parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree, default=str, skipkeys=True)}


def yaml_of(path: Path) -> Mapping[str, Any]:
    """Read a YAML file of keys with plain data.

    Raises:
        ValueError: no such file, or a damaged one.

    """
    tree = plain_yaml(path)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path.name} is damaged: it holds no keys")
    return tree


def plain_yaml(path: Path) -> Any:
    """Read a YAML file of plain data.

    Raises:
        ValueError: no such file, or a damaged one.

    """
    text = yaml_text(path)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # a number of 5,000 digits, a list as a key
        raise ValueError(f"{path.name} is damaged: it is not YAML") from None


def yaml_text(path: Path) -> str:
    """Read the text of a YAML file that can be loaded in little memory.

    Raises:
        ValueError: no such file, or one that is no YAML, is too large or too deep, or repeats itself by aliases.

    """
    if not path.is_file():
        raise ValueError(f"no {path.parent.name}/{path.name}")
    with path.open("rb") as file:
        held = file.read(BYTES + 1)
    if len(held) > BYTES:
        raise ValueError(f"{path.name} is damaged: it has more than {BYTES:,} bytes")
    try:
        text = held.decode("utf-8")
        _check_events(yaml.parse(text, Loader=_LOADER), path.name)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path.name} is damaged: it is not YAML") from None
    return text


def _check_events(events: Iterable[yaml.Event], name: str) -> None:
    """Refuse what grows when it is loaded: nested levels, aliases, very many values."""
    depth = 0
    for count, event in enumerate(events, 1):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{name} is damaged: it repeats itself by an alias, which no run writes")
        if depth > DEPTH or count > EVENTS:
            raise ValueError(f"{name} is damaged: it has more than {DEPTH} levels, or {EVENTS:,} values")


def json_of(path: Path) -> dict[str, Any]:
    """Read a JSON file of one object.

    Raises:
        ValueError: a damaged file.
        OSError: it cannot be read.

    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path.name} is damaged: it is not JSON") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is damaged: it holds no keys")
    return tree


def finite(value: Any) -> bool:
    """Say whether a value is a number, neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
