"""One runner and the hand-written loop in this process, in pairs."""

from __future__ import annotations

from typing import Any

from fedsparse.bench.loop import HandWritten, fastest, named
from fedsparse.bench.pairs import Clock, Train, Trained
from fedsparse.bench.problems import Problem, Task
from fedsparse.bench.rows import outcome, summarise


def in_pairs(train: Train, problem: Problem, cohort: int = 1) -> dict[str, Any]:
    """Run both on one problem -> the figures of a row.

    Args:
        train: the runner.
        problem: the model, and how often it is measured.
        cohort: K, the clients that train together.

    """
    task = Task(problem, problem.pairs + problem.warmup + 1, cohort)
    options = fastest(task)
    hand = HandWritten(task.net(), options)
    clock = Clock(task.batches, options, hand.round, range(problem.warmup, task.rounds - 1))
    trained = train(task, clock)
    clock.finish(task.rounds)
    return {
        "cohort": cohort,
        "sgd": named(options),
        **summarise(clock.times, cohort),
        **outcome(trained, Trained(hand.weights)),
    }
