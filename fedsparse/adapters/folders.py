"""Folders that commands write: whole or not at all, and never over other content."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def publish(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder beside its target, and rename it; one with the same files and bytes stays.

    Args:
        target: which may exist, empty or as it would be written.
        fill: writes into an empty folder.

    Raises:
        ValueError: the target holds something else.

    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        fill(new)
        if not target.exists():
            os.replace(new, target)
        elif target.is_dir() and not any(target.iterdir()):
            for path in new.iterdir():
                shutil.move(path, target / path.name)
        else:
            _check_same(target, new)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of a folder, by path in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _check_same(target: Path, new: Path) -> None:
    """Refuse a target whose files differ from the new ones.

    Raises:
        ValueError: names a file that differs.

    """
    there, wanted = digests(target) if target.is_dir() else {".": ""}, digests(new)
    different = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if different:
        raise ValueError(
            f"{target} exists and holds other content ({different[0]}), which is not overwritten; "
            "remove it, or choose another folder with --out"
        )
