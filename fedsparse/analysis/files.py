"""Files of a run folder as plain data: nothing in them is executed, and a damaged one says so in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # plain data only, read in C where that was built


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
    """Read a YAML file of plain data.

    Raises:
        ValueError: no such file, or a damaged one.

    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except FileNotFoundError:
        raise ValueError(f"no {path.parent.name}/{path.name}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path.name} is damaged: it is not YAML") from None
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path.name} is damaged: it holds no keys")
    return tree


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
