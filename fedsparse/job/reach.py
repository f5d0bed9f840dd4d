"""How the clients' work gets to them: in this process, or to where their data are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsparse.federation.round import TakePart, take_part
from fedsparse.job.parts import Assembly
from fedsparse.job.resume import Job
from fedsparse.preparation.preparation import Gather, in_process
from fedsparse.simulation.own_models import Elsewhere


@dataclass(frozen=True)
class Joined:
    """A run with its clients, and the ways to them; by default all are in this process.

    Attributes:
        assembly: the parts of the run, with what the clients hold.
        gather: runs a task for clients, before the first round.
        take_part: trains cohorts in an open round.
        own: evaluates the clients' own models where these are; None: they are in this process.
        apart: whether clients keep their state and data elsewhere.

    """

    assembly: Assembly
    gather: Gather = in_process
    take_part: TakePart = take_part
    own: Elsewhere | None = None
    apart: bool = False


Join = Callable[[Job, Assembly], Joined]


def in_one_process(job: Job, assembly: Assembly) -> Joined:
    """Take part with every client of the partition, in this process."""
    return Joined(assembly)
