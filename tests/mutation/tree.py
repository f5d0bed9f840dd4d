"""The project's files: which are the core, their copies for the workers, and the names that stored results go by."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path


def core_files(root: Path, patterns: Sequence[str]) -> list[str]:
    """Paths of the files to change, from the root, in order.

    Raises:
        ValueError: a pattern fits none.

    """
    files: set[str] = set()
    for pattern in patterns:
        found = [path.relative_to(root).as_posix() for path in root.glob(pattern)]
        if not found:
            raise ValueError(f"tool.mutate.core of pyproject.toml: no file is {pattern}")
        files.update(found)
    return sorted(files)


def project_files(root: Path) -> list[str]:
    """Paths of all files that git knows or does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def copy_project(root: Path, files: Iterable[str], into: Path) -> None:
    """Make a folder equal to the project; what is equal keeps its time, and with it Python's bytecode."""
    wanted = set(files)
    for path in list(into.rglob("*")) if into.is_dir() else []:
        if path.is_file() and path.suffix != ".pyc" and path.relative_to(into).as_posix() not in wanted:
            path.unlink()
    for name in wanted:
        source, target = root / name, into / name
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def digest(root: Path, files: Iterable[str]) -> str:
    """Name for the contents of files."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0".encode() + hashlib.sha256((root / name).read_bytes()).digest())
    return total.hexdigest()[:20]


def read_explanations(path: Path) -> dict[str, str]:
    """Why a mutant cannot be noticed: its key on one line, the reason on the next, indented; # starts a comment.

    Raises:
        ValueError: a key without a reason.

    """
    reasons: dict[str, str] = {}
    key = None
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in [*lines, "#"]:
        if line[:1].isspace() and line.strip() and key is not None:
            reasons[key] = line.strip()
            key = None
        elif line.strip():
            if key is not None:
                raise ValueError(f"{path}: no reason follows {key!r}")
            key = None if line.startswith("#") else line
    return reasons
