"""Goes through models, runners and settings, one row after the other; what fails is a row that says why."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedsparse.bench import federated, processes
from fedsparse.bench.peers import ONLY, PEERS
from fedsparse.bench.problems import BARE, CLIENTS, Problem, Task
from fedsparse.bench.rows import Row


@dataclass(frozen=True)
class Collector:
    """How rows are measured.

    Attributes:
        threads: that torch may use.
        memory: measure memory too, each runner in a process of its own.
        peers: name -> Python of its environment.
        everywhere: measure peers on every model, also where a round takes long.

    """

    threads: int
    memory: bool
    peers: Mapping[str, Path]
    everywhere: bool

    def rows(self, problems: Sequence[Problem]) -> Iterator[Row]:
        """Measure all."""
        for problem in problems:
            loop = Row(problem.name, "loop")
            hand = self._remember(loop, partial(self._alone, "loop", problem.name)).memory
            for row in self._own(problem):
                yield replace(row, hand_memory=hand)
            for name, python in self._beside(problem):
                yield replace(self._peer(problem, name, python), hand_memory=hand)

    def _beside(self, problem: Problem) -> list[tuple[str, Path]]:
        """Peers that are measured on a problem, of those that run it."""
        wanted = self.everywhere or problem.peers
        return [peer for peer in self.peers.items() if wanted and problem.name in ONLY.get(peer[0], (problem.name,))]

    def _own(self, problem: Problem) -> Iterator[Row]:
        """Measure fedsparse: every cohort, and at the first one all that may run beside training."""
        for i, cohort in enumerate(problem.cohorts):
            for setting in problem.settings if i == 0 else (BARE,):
                row = Row(problem.name, "fedsparse", setting=setting, cohort=actual(problem, cohort))
                measured = attempt(row, partial(_measure, problem, row))
                yield self._remember(measured, partial(self._alone, "fedsparse", row.model, row.cohort))

    def _peer(self, problem: Problem, name: str, python: Path) -> Row:
        """Measure a peer in its own environment."""
        row, module, threads = Row(problem.name, name), PEERS[name], self.threads
        often = [problem.name, "--pairs", str(problem.pairs), "--warmup", str(problem.warmup)]
        row = attempt(row, lambda: replace(row, **processes.figures(python, module, often, threads)))
        return self._remember(row, lambda: processes.memory(python, module, [problem.name], threads))

    def _alone(self, runner: str, model: str, cohort: int = 1) -> int | None:
        return processes.alone(runner, model, cohort, self.threads)

    def _remember(self, row: Row, measure: Callable[[], int | None]) -> Row:
        """Add memory to a row, if it is wanted and the row's setting is the one that is measured."""
        if not self.memory or row.failed or row.setting not in ("", BARE):
            return row
        try:
            return replace(row, memory=measure())
        except RuntimeError as error:
            return replace(row, note=f"memory: {error}")


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Measure, or note why it could not be done: whatever a runner raises, the other rows are wanted."""
    try:
        return measure()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return replace(row, failed=True, note=reason)


def actual(problem: Problem, cohort: int) -> int:
    """Rows of a cohort at a bound."""
    return Task(problem, 1).plan(cohort).cohort_size(CLIENTS)


def _measure(problem: Problem, row: Row) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return federated.measure(problem, row.setting, Path(folder), row.cohort)
