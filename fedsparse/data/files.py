"""Files that someone else may have made: only regular ones are opened, and their names are shown as text."""

from __future__ import annotations

from pathlib import Path

MOST_BYTES = 2**28  # of a file of a published data set; CIFAR-100's 50,000 images take 155 million
LONGEST = 300  # of what an error says of a file


def printable(text: object) -> str:
    r"""Write what a terminal would obey as the escape sequence that Python has for it: names and texts of files.

    >>> printable("a\x1b[31mb\n\u202ec"), printable("Ä 9")
    ('a\\x1b[31mb\\n\\u202ec', 'Ä 9')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def reason_of(error: BaseException) -> str:
    """Say in one short line why a file cannot be read."""
    said = " ".join(str(error).split()) or type(error).__name__
    return printable(said if len(said) <= LONGEST else said[:LONGEST] + "...")


def checked_file(path: str | Path) -> Path:
    """Return the path of a regular file: a pipe would be waited for, a device read without end.

    Raises:
        ValueError: there is something else, or nothing.

    """
    place = Path(path)
    if place.is_file():
        return place
    kind = "is no regular file" if place.exists() else "is missing, or a link to nothing"
    raise ValueError(f"{printable(place)} {kind}; put the file itself there")


def checked_root(root: object, wanted: str) -> Path:
    """Return ``data.root`` as a path.

    Args:
        root: what was given.
        wanted: says which folder it is to be.

    Raises:
        ValueError: it is no folder.

    """
    if not isinstance(root, str | Path) or not Path(root).is_dir():
        raise ValueError(f"data.root={'null' if root is None else root} is no folder; set data.root to {wanted}")
    return Path(root)


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that holds anything but folders and regular files, for those who read it as a whole.

    Raises:
        ValueError: names what is neither.

    """
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_dir():
            checked_file(path)
