"""Atomic writes of files: a new file beside the target is renamed to it, no link is followed, lines are appended whole.

A run folder may come from someone else, and a run may be killed or fill the disk at any moment.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsparse.core.folder import CHECKPOINTS, CONFIG

Content = bytes | str | Callable[[Any], object]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITTEN_WHOLE = (".", str(Path(CONFIG).parent), CHECKPOINTS)  # folders in a run folder
LEFT_BEHIND = ("*.part", ".*.tmp")  # partial files of killed writers; the second of earlier versions


class Disk(io.RawIOBase):
    """A file for complete writes, which keeps the first error.

    ``torch.save`` turns every error into a RuntimeError without file and reason.

    Attributes:
        descriptor: of the open file.
        error: the first OSError of a write; None without.

    """

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self.descriptor = os.open(path, _flags(flags), 0o666)
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return True: the file is writable."""
        return True

    def fileno(self) -> int:
        """Descriptor of the file."""
        return self.descriptor

    def close(self) -> None:
        """Close the file, once."""
        if not self.closed:
            super().close()
            os.close(self.descriptor)

    def write(self, data: Any) -> int:
        """Write all bytes, in several calls if the system takes fewer at once, as when a disk fills."""
        if self.closed:  # a failed writer's later writes must not reach another file with the same descriptor
            raise ValueError("the file is closed")
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.write(self.descriptor, view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        return done


def write(path: Path, content: Content, keep: Path | None = None) -> None:
    """Write a file beside its target, flush it to the disk and rename it; after an error or a kill the old one stays.

    Args:
        path: the file. A link there is replaced, not followed.
        content: text (UTF-8), bytes, or a function that writes to a binary file.
        keep: path to which the old file is renamed; None: it is replaced.

    Raises:
        OSError: it cannot be written; names the file, and what to do if the disk is full.

    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    with named(path):
        disk = Disk(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with disk:
                _fill(disk, content)
                os.fsync(disk.descriptor)
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _fill(disk: Disk, content: Content) -> None:
    if not callable(content):
        disk.write(content.encode() if isinstance(content, str) else content)
        return
    try:
        content(disk)
    except Exception as error:
        raise disk.error or error from None


def append(path: Path, data: bytes) -> None:
    """Append to a file: all bytes, or none on an error.

    Raises:
        OSError: names the file, and what to do if the disk is full.

    """
    with named(path):
        disk = Disk(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with disk:
            end = os.fstat(disk.descriptor).st_size
            try:
                disk.write(data)
            except BaseException:
                os.ftruncate(disk.descriptor, end)
                raise


def change(path: Path, size: int) -> Disk:
    """Open a file to be written in place, and set its size; added bytes read as zeros."""
    with named(path):
        disk = Disk(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(disk.descriptor, size)
    return disk


def put(disk: Disk, offset: int, data: Any) -> None:
    """Write bytes at an offset of a file.

    Raises:
        OSError: names the file, and what to do if the disk is full.

    """
    with named(disk.path):
        os.lseek(disk.descriptor, offset, os.SEEK_SET)
        disk.write(data)


def unshare(path: Path) -> None:
    """Replace a hard link by a copy, before a file is changed in place, so that no other path changes too.

    Raises:
        OSError: it is a symbolic link, or no plain file.

    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise OSError(errno.EINVAL, "is a link or no plain file, and would be written to; take it away", str(path))
    if path.stat().st_nlink > 1:
        with path.open("rb") as file:
            write(path, lambda copy: shutil.copyfileobj(file, copy))


class LogFile(logging.FileHandler):
    """A log handler that appends to its file, and replaces a link instead of following it."""

    def _open(self) -> io.TextIOWrapper:
        path = Path(self.baseFilename)
        if path.is_symlink():
            path.unlink()
        unshare(path)
        return super()._open()


def refuse_links(folder: Path) -> None:
    """Refuse a run folder with links, through which a run would write elsewhere, or pipes, on which it would hang.

    Links in place of atomically written files are harmless, as they are replaced; W&B keeps links in its own folder.

    Raises:
        ValueError: names the first link, or the first path that is neither file nor folder.

    """
    for parent, folders, names in os.walk(folder):
        inner = Path(parent).relative_to(folder).as_posix() not in WRITTEN_WHOLE
        links = [Path(parent) / name for name in [*folders, *(names if inner else [])]]
        if found := [link for link in links if link.is_symlink()]:
            raise ValueError(f"{found[0]} is a link, and the run would write through it; put its content there")
        other = [path for path in map(Path(parent).joinpath, names) if path.exists() and not path.is_file()]
        if other:
            raise ValueError(f"{other[0]} is neither file nor folder; remove it")
        folders[:] = [name for name in folders if name != "wandb"]


def clear(folder: Path, age: float = 0.0) -> None:
    """Remove the partial files of killed writers from a folder.

    Args:
        folder: to be cleared.
        age: least seconds since a file was last written; other processes may be writing younger ones.

    """
    for path in [path for pattern in LEFT_BEHIND for path in folder.glob(pattern)]:
        if path.is_symlink() or (path.is_file() and path.stat().st_mtime <= time.time() - age):
            path.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Re-raise an OSError with the target's path, and with advice if the disk is full."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        if error.errno in FULL:
            said += ": free some space, then start again or go on with resume=<run folder>; what was saved before stays"
        raise OSError(error.errno, said, str(path)) from error


def _flags(flags: int) -> int:
    """Add the system's flags against following links and against changing line ends."""
    return flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
