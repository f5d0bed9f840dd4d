"""Files of a run folder as plain data: nothing in them is executed, and a damaged one says so in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

DASH = "\N{EN DASH}"  # where a table has nothing to say

LARGEST = 1 << 24  # bytes of a file of keys; those of runs have some thousands
_NODES = 100_000  # keys and values of one; a few anchors of YAML can stand for any number
_LONGEST = 120  # characters of a name that is shown
_HUGE = 1e18  # no figure of a run comes near: sums and squares of those below are finite
# a stored YAML file holds at most this much, whoever wrote it; a configuration has 8 kB, 700 events and 6 levels
BYTES, EVENTS, DEPTH = 2**20, 20_000, 50
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
    """Read a YAML file of keys with plain data.

    Raises:
        ValueError: no such file, or a damaged one.

    """
    return _keys(path, plain_yaml(path))


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
    try:
        text = _text(path, BYTES)
        _check_events(yaml.parse(text, Loader=_LOADER), path.name)
    except FileNotFoundError:
        raise ValueError(f"no {path.parent.name}/{path.name}") from None
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
        tree = json.loads(_text(path))
    except NotPlain:
        raise
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is damaged: it is not JSON") from None
    return dict(_keys(path, tree))


class NotPlain(ValueError):
    """What has the name of a file is none, or far too large."""


def _text(path: Path, largest: int = LARGEST) -> str:
    """Read a plain file of a sensible size: no pipe, which would be waited for, and nothing without an end."""
    if path.is_dir():  # opened below, its error would name the number of a descriptor
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor)
        if not stat.S_ISREG(kind.st_mode):
            raise NotPlain(f"{path.name} is no plain file")
        if kind.st_size > largest:
            raise NotPlain(f"{path.name} has more than {largest:,} bytes: no run writes such a file")
        return file.read().decode()


def _keys(path: Path, tree: Any) -> Mapping[str, Any]:
    """Let through a mapping that is not too large to be walked."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path.name} is damaged: it holds no keys")
    if _size(tree, _NODES) < 0:
        raise ValueError(f"{path.name} is damaged: it holds more than {_NODES} values")
    return tree


def _size(node: Any, left: int) -> int:
    """Count down from ``left`` over all values of a tree, to below zero at most."""
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    for value in inner:
        left = _size(value, left - 1)
        if left < 0:
            return left
    return left


def short(text: str) -> str:
    """Cut a text that is too long to be shown; two that differ stay different.

    >>> short("x" * 500)[-20:]
    'xxxxx... (c38c2bf30)'
    """
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 20]}... ({hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:9]})"


def finite(value: Any) -> bool:
    """Say whether a value is a number that can be counted with: neither infinite nor NaN, nor of a size beyond all."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_HUGE <= value <= _HUGE
