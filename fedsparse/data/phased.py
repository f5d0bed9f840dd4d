"""The cohorts of a run of several phases: each has its clients and its local work, all have rows of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsparse.data.rounds import Cohort, RoundPlan


class Plan(Protocol):
    """The cohorts of every round.

    Attributes:
        seed: the run's seed.
        processes: how many processes share the clients of a round.
        process: which of them this is.

    """

    seed: int
    processes: int
    process: int

    def number_of_cohorts(self, round: int) -> int:
        """Cohorts of one round, as many for each process."""

    def cohorts(self, round: int) -> list[Cohort]:
        """Build the cohorts of one round that this process trains."""


class PhasedPlan:
    """Plans one after the other.

    A cohort's ``round`` is counted from 0 over the phases of its kind: what clients draw while they learn does not
    depend on an exploration before it, and is drawn once.

    Args:
        stages: rounds and plan of each phase, and how many rounds of its kind come before it.
        main: the plan whose cohort size holds for all.

    """

    def __init__(self, stages: Sequence[tuple[int, RoundPlan, int]], main: RoundPlan) -> None:
        self.stages, self.main = list(stages), main
        self.seed, self.processes, self.process = main.seed, main.processes, main.process

    def at(self, round: int) -> tuple[RoundPlan, int]:
        """Find a round's plan, and its number among those of its kind; the last plan goes on for ever."""
        for rounds, plan, before in self.stages[:-1]:
            if round < rounds:
                return plan, before + round
            round -= rounds
        _, plan, before = self.stages[-1]
        return plan, before + round

    def sample(self, round: int) -> Sequence[int]:
        """List the clients of a round."""
        plan, own = self.at(round)
        return plan.sample(own)

    def number_of_cohorts(self, round: int) -> int:
        """Cohorts of one round, as many for each process."""
        plan, own = self.at(round)
        return plan.number_of_cohorts(own, self._rows)

    def cohorts(self, round: int) -> list[Cohort]:
        """Build the cohorts of one round that this process trains."""
        plan, own = self.at(round)
        return plan.cohorts(own, self._rows)

    @property
    def _rows(self) -> int:
        return self.main.cohort_size(len(self.main.sample(0)))
