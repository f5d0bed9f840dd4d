"""What a ``_target_`` of a configuration names, imported."""

from __future__ import annotations

from typing import Any

from hydra._internal.utils import _locate

from fedsparse.data.files import printable, reason_of


def imported(key: str, target: str) -> Any:
    """Import what a dotted name stands for.

    Hydra's own ``get_object`` does the same, and logs three lines where it fails.

    Args:
        key: where the name stands in the configuration, for the message.
        target: such as ``mypackage.rules.Heaviest``.

    Raises:
        ValueError: one line with the key, the name, and what is missing of it.

    """
    try:
        return _locate(target)
    except Exception as error:  # importing runs a package's own code
        why = f"{key} is {target}, which cannot be imported here: {_why(target, error)}"
        raise ValueError(printable(why)) from error


def _why(target: str, error: Exception) -> str:
    """Say what is missing of a name, or what its package raised."""
    cause = error.__cause__ or error
    missing = (isinstance(cause, ModuleNotFoundError) and cause.name) or ""
    if not missing or not f"{target}.".startswith(f"{missing}."):  # of the package's own code
        return f"{type(cause).__name__}: {reason_of(cause)}"
    home, _, name = missing.rpartition(".")
    if home:
        return f"{home} has no {name}"
    return f"there is no package {name} in the folder of the command, on PYTHONPATH, or installed"
