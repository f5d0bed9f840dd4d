"""Names that a package exports, whose modules are imported when a name is asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and the ``__dir__`` of a package, of names by the module that each comes from.

    A submodule of the same name would take the place of what is exported as soon as it is imported: no name may be one.

    >>> get, listed = lazily("fedsparse.core", {"prod": "math"})
    >>> get("prod")([2, 3]), "prod" in listed()
    (6, True)
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, listed
