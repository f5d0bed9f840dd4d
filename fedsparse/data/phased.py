"""The cohorts of a run of several phases, which differ in clients and local work, but not in K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsparse.data.rounds import Cohort, RoundPlan


class Plan(Protocol):
    """The cohorts of every round.

    Attributes:
        seed: the run's seed.
        processes: number of processes that share the clients of a round.
        process: index of this process.

    """

    seed: int
    processes: int
    process: int

    def number_of_cohorts(self, round: int) -> int:
        """Count the cohorts of one round, equal for all processes."""

    def cohorts(self, round: int) -> list[Cohort]:
        """Build the cohorts of one round that this process trains."""


class PhasedPlan:
    """The plans of phases, in sequence.

    A cohort's ``round`` is counted from 0 over the phases of its kind, so that random numbers of learning rounds do not
    depend on an exploration before them.

    Args:
        stages: of each phase its rounds, its plan, and the number of earlier rounds of its kind.
        main: the plan that sets K of all phases.

    """

    def __init__(self, stages: Sequence[tuple[int, RoundPlan, int]], main: RoundPlan) -> None:
        self.stages, self.main = list(stages), main
        self.seed, self.processes, self.process = main.seed, main.processes, main.process

    def at(self, round: int) -> tuple[RoundPlan, int]:
        """Find a round's plan, and its index among rounds of its kind; the last plan has no end."""
        for rounds, plan, before in self.stages[:-1]:
            if round < rounds:
                return plan, before + round
            round -= rounds
        _, plan, before = self.stages[-1]
        return plan, before + round

    def sample(self, round: int) -> Sequence[int]:
        """List the clients of a round."""
        plan, index = self.at(round)
        return plan.sample(index)

    def number_of_cohorts(self, round: int) -> int:
        """Count the cohorts of one round, equal for all processes."""
        plan, index = self.at(round)
        return plan.number_of_cohorts(index, self._rows)

    def cohorts(self, round: int) -> list[Cohort]:
        """Build the cohorts of one round that this process trains."""
        plan, index = self.at(round)
        return plan.cohorts(index, self._rows)

    @property
    def _rows(self) -> int:
        return self.main.cohort_size(len(self.main.sample(0)))
