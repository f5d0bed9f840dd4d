"""Adapters of a finished run: list, export in PEFT's format, merge, evaluate, answer. It reads runs and trains none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = ["Kept", "evaluation", "export", "greedy", "listing", "matrix", "merge"]

if TYPE_CHECKING:
    from fedsparse.adapters.answers import greedy
    from fedsparse.adapters.exporting import evaluation, export, merge
    from fedsparse.adapters.inventory import listing
    from fedsparse.adapters.kept import Kept
    from fedsparse.adapters.measure import matrix
else:
    _HOMES = {
        "Kept": "fedsparse.adapters.kept",
        "evaluation": "fedsparse.adapters.exporting",
        "export": "fedsparse.adapters.exporting",
        "greedy": "fedsparse.adapters.answers",
        "listing": "fedsparse.adapters.inventory",
        "matrix": "fedsparse.adapters.measure",
        "merge": "fedsparse.adapters.exporting",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
