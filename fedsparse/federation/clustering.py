"""clusters.jsonl: which groups were joined in each round, and how alike they were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsparse.core import files
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change
from fedsparse.federation.watcher import Watcher

if TYPE_CHECKING:
    from fedsparse.federation.round import Round


class ClusterTable(Watcher):
    """Writes a JSON line for each round with clusters: assignment, k, what chose it, and cosines by representation.

    Args:
        path: the file; None writes nothing, as in all but the first of several processes.
        closed: rounds closed; lines of later ones are dropped.
        truth: true cluster of each group, which the adjusted Rand index (Hubert and Arabie 1985) compares with; empty
            if it is not known.

    Attributes:
        before: the assignment of the last mixing, for the adjusted Rand index of the next.

    """

    def __init__(self, path: Path | None, closed: int = 0, truth: Sequence[int] = ()) -> None:
        self.path, self.truth = path, list(truth)
        kept = [] if path is None or not path.is_file() else list(_until(path, closed))
        self.before: list[int] | None = kept[-1]["labels"] if kept else None
        if path is not None and path.is_file():
            files.write(path, "".join(_line(each) for each in kept))

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Write the line of a round whose rows were mixed."""
        mixed = round.mixed
        if self.path is None or mixed is None or mixed.clusters is None:
            return
        from sklearn.metrics import adjusted_rand_score

        found, labels = mixed.clusters, list(mixed.clusters.labels)
        same = None if self.before is None else float(adjusted_rand_score(self.before, labels))
        true = float(adjusted_rand_score(self.truth, labels)) if self.truth else None
        figures = {
            "round": round.number + 1,
            "labels": labels,
            "k": found.k,
            "scores": {str(k): score for k, score in found.scores.items()},
            "inertia": found.inertia,
            "ari_before": same,
            "ari_truth": true,
            "cosines": {of: matrix.tolist() for of, matrix in (mixed.similarities or {}).items()},
        }
        files.append(self.path, _line(figures).encode())
        self.before = labels


def _line(figures: dict[str, Any]) -> str:
    return json.dumps(figures) + "\n"


def _until(path: Path, closed: int) -> Iterator[dict[str, Any]]:
    """Read the lines of closed rounds, up to a damaged one."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            figures = json.loads(line)
            if figures["round"] > closed:
                return
        except (ValueError, TypeError, KeyError):
            return
        yield figures
