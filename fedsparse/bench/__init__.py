"""A round's time, memory and bytes beside those of a hand-written loop and of the peers: ``python -m fedsparse.bench``.

All do the same work on the same batches and end at the same weights. After warm-up rounds, each round of a runner is
followed by one of the hand-written loop in the same process, so that the machine's drift meets both alike.
"""

from __future__ import annotations

from pathlib import Path

from fedsparse.bench.problems import BARE, EVERYTHING, PROBLEMS, UNVALIDATED, Problem
from fedsparse.bench.rows import Row

__all__ = ["BARE", "EVERYTHING", "PROBLEMS", "UNVALIDATED", "Problem", "Row", "measure"]


def measure(problem: Problem, setting: str, folder: Path, cohort: int = 1) -> Row:
    """Run fedsparse and the hand-written loop in pairs on one problem; see ``fedsparse.bench.federated.measure``."""
    from fedsparse.bench import federated  # here, so that a peer's processes need not load Lightning

    return federated.measure(problem, setting, folder, cohort)
