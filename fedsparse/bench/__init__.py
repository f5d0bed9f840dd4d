"""A round's time, memory and bytes beside those of a hand-written loop and of the peers: ``python -m fedsparse.bench``.

All do the same work on the same batches and end at the same weights. After warm-up rounds, each round of a runner is
followed by one of the hand-written loop in the same process, so that the machine's drift meets both alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = ["BARE", "EVERYTHING", "PROBLEMS", "UNVALIDATED", "Problem", "Row", "measure"]

if TYPE_CHECKING:
    from fedsparse.bench.federated import measure
    from fedsparse.bench.problems import BARE, EVERYTHING, PROBLEMS, UNVALIDATED, Problem
    from fedsparse.bench.rows import Row
else:  # a command line is read without torch
    _HOMES = {
        "BARE": "fedsparse.bench.problems",
        "EVERYTHING": "fedsparse.bench.problems",
        "PROBLEMS": "fedsparse.bench.problems",
        "UNVALIDATED": "fedsparse.bench.problems",
        "Problem": "fedsparse.bench.problems",
        "Row": "fedsparse.bench.rows",
        "measure": "fedsparse.bench.federated",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
