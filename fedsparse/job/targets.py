"""Imports the object that a ``_target_`` names."""

from __future__ import annotations

from typing import Any

from hydra._internal.utils import _locate

from fedsparse.data.files import printable, reason_of


def imported(key: str, target: str) -> Any:
    """Import the object of a dotted name.

    Hydra's ``get_object`` does the same, but logs three lines where it fails.

    Args:
        key: of the configuration, for the message.
        target: the name, such as ``mypackage.rules.Heaviest``.

    Raises:
        ValueError: it cannot be imported; one line with the key, the name and the reason.

    """
    try:
        return _locate(target)
    except Exception as error:  # the import runs a package's code, which may raise any exception
        why = f"{key} is {target}, which cannot be imported here: {_why(target, error)}"
        raise ValueError(printable(why)) from error


def _why(target: str, error: Exception) -> str:
    """Describe the missing part of a name, or the error that its package raised."""
    cause = error.__cause__ or error
    missing = (isinstance(cause, ModuleNotFoundError) and cause.name) or ""
    if not missing or not f"{target}.".startswith(f"{missing}."):  # raised by the package's code
        return f"{type(cause).__name__}: {reason_of(cause)}"
    home, _, name = missing.rpartition(".")
    if home:
        return f"{home} has no {name}"
    return f"there is no package {name} in the folder of the command, on PYTHONPATH, or installed"
