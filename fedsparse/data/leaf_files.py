"""Reads and checks LEAF's JSON files, user by user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedsparse.data.files import checked_file, printable, reason_of

LONGEST_NAME = 200  # characters of a user's name, which is stored for each sample
User = tuple[np.ndarray, np.ndarray]  # samples and labels
Decode = Callable[[Any, Any, str], User]


def read_part(root: str | Path | None, name: str, part: str, decode: Decode) -> dict[str, User]:
    """Read all files of ``<root>/<part>``; users without a sample are left out.

    Args:
        root: ``data.root``.
        name: of the data set, for messages.
        part: train or test.
        decode: converts a user's ``x`` and ``y`` to arrays; its errors contain the given place.

    Raises:
        ValueError: the folder is missing, a file is damaged, or a user occurs twice; one line with LEAF's command.

    """
    how = f"run ./preprocess.sh -s niid --sf 0.05 -k 0 -t sample in LEAF's data/{name}, and set data.root to its data"
    if not isinstance(root, str | Path) or not (folder := Path(root) / part).is_dir():
        raise ValueError(f"data.root={'null' if root is None else root} has no folder {part}; {how}")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} has no .json file; {how}")
    users: dict[str, User] = {}
    places: dict[str, Path] = {}
    for path in files:
        for user, samples in _read(path, how, decode).items():
            if user in places:
                other = printable(places[user].name)
                raise ValueError(
                    f"{printable(path)}: user {printable(user)} is in {other} too; remove one of the files"
                )
            users[user], places[user] = samples, path
    if not users:
        raise ValueError(f"{folder} holds no sample; {how}")
    return users


def _read(path: Path, how: str, decode: Decode) -> dict[str, User]:
    """Read the users of one file."""
    try:
        content = json.loads(checked_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as JSON ({reason_of(error)}); to make it again, {how}"
        ) from error
    users, counts, data = _fields(content, path, how)
    decoded = {}
    for user, count in zip(users, counts, strict=True):
        where = printable(f"{path}: user {user}")
        x, y = _samples(data.get(user), where)
        if not len(x) == len(y) == count:
            raise ValueError(f"{where} has {len(x)} x and {len(y)} y and num_samples says {count}; {how}")
        if y:
            decoded[user] = decode(x, y, where)
    return decoded


def _fields(content: Any, path: Path, how: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Check and return ``users``, ``num_samples`` and ``user_data`` of a file."""
    kinds = {"users": list, "num_samples": list, "user_data": dict}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ValueError(f"{printable(path)} has no {kind.__name__} {key}, so it is no file of LEAF; {how}")
    users, counts, data = (content[key] for key in kinds)
    named = all(isinstance(user, str) and len(user) <= LONGEST_NAME for user in users)
    if len(users) != len(counts) or not named or len(set(users)) < len(users):
        wanted = f"{len(counts)} different names of at most {LONGEST_NAME} characters, one for each of num_samples"
        raise ValueError(f"{printable(path)}: users are not {wanted}; {how}")
    return users, counts, data


def _samples(user: Any, where: str) -> tuple[list[Any], list[Any]]:
    """Check and return ``x`` and ``y`` of a user."""
    if not isinstance(user, dict) or not all(isinstance(user.get(key), list) for key in ("x", "y")):
        raise ValueError(f"{where} has no x and y in user_data")
    return user["x"], user["y"]
