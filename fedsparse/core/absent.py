"""Lets installed packages count as absent while another package is imported, which imports them where they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import ModuleType


class _Absence(DistributionFinder):
    """Answers for some packages, before all other finders, as Python does where they are not installed.

    Args:
        packages: their names, of the module as of the distribution.

    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Refuse an import."""
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:  # type: ignore[override]
        """Refuse a question for a version."""
        if context.name in self.packages:
            raise PackageNotFoundError(context.name)
        return iter(())


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Let packages count as absent within a ``with`` block; those that are imported already stay.

    >>> with absent("this"):
    ...     import this
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'this'
    """
    finder = _Absence([name for name in packages if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
