"""Checks of untrusted files: only regular files are opened, and names are printed without control characters."""

from __future__ import annotations

from pathlib import Path

MOST_BYTES = 2**28  # of a file of a published data set; CIFAR-100's 50,000 images take 155 million
LONGEST = 300  # characters of a reason in an error


def printable(text: object) -> str:
    r"""Escape characters that are not printable, which a terminal would interpret, as Python does.

    >>> printable("a\x1b[31mb\n\u202ec"), printable("Ä 9")
    ('a\\x1b[31mb\\n\\u202ec', 'Ä 9')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def reason_of(error: BaseException) -> str:
    """Write in one short line why a file cannot be read."""
    message = " ".join(str(error).split()) or type(error).__name__
    return printable(message if len(message) <= LONGEST else message[:LONGEST] + "...")


def checked_file(path: str | Path) -> Path:
    """Return the path of a regular file; a pipe would block, and a device may have no end.

    Raises:
        ValueError: it is missing, or no regular file.

    """
    place = Path(path)
    if place.is_file():
        return place
    kind = "is no regular file" if place.exists() else "is missing, or a link to nothing"
    raise ValueError(f"{printable(place)} {kind}; put the file itself there")


def checked_root(root: object, wanted: str) -> Path:
    """Return ``data.root`` as a path.

    Args:
        root: the configured value.
        wanted: description of the folder, for the message.

    Raises:
        ValueError: it is no folder.

    """
    if not isinstance(root, str | Path) or not Path(root).is_dir():
        raise ValueError(f"data.root={'null' if root is None else root} is no folder; set data.root to {wanted}")
    return Path(root)


def check_folder(folder: str | Path) -> None:
    """Refuse a folder with entries other than folders and regular files.

    Raises:
        ValueError: one line with the first other entry.

    """
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_dir():
            checked_file(path)
