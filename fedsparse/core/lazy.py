"""Lazy exports of a package: a module is imported when its name is first read (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Build ``__getattr__`` and ``__dir__`` of a package, from a mapping of exported names to their modules.

    No name may be that of a submodule, which would replace the exported object as soon as it is imported.

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
