"""A row of the figures: one runner on one model beside the hand-written loop."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from fedsparse.bench.pairs import Times, Trained
from fedsparse.bench.problems import CLIENTS


@dataclass(frozen=True)
class Row:
    """Medians over the pairs, in milliseconds a round, and the ratio's median, least and greatest.

    Attributes:
        model: name of the problem.
        runner: ``fedsparse`` or a peer.
        version: of the runner.
        setting: what ran beside training.
        cohort: K, the clients that train together.
        pairs: rounds that count.
        hand_ms: a round of the hand-written loop.
        runner_ms: a round of the runner.
        ratio: median over the pairs; ``ratio_min`` and ``ratio_max`` are the least and the greatest.
        ratio_of_least: the runner's fastest round over the loop's fastest, which a busy machine disturbs least.
        extra_ms_per_cohort: what the runner takes more, a cohort of K clients.
        weights_differ: largest difference of the final weights.
        bytes_up: what the clients of a round send, as serialised; None if nothing is.
        memory: growth of peak resident memory over training, in bytes; None where it was not measured.
        hand_memory: the same of the hand-written loop in a process of its own.
        note: why a figure is missing.
        failed: there are no figures at all.

    """

    model: str
    runner: str
    version: str = ""
    setting: str = ""
    cohort: int = 1
    pairs: int = 0
    hand_ms: float | None = None
    runner_ms: float | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    ratio_of_least: float | None = None
    extra_ms_per_cohort: float | None = None
    weights_differ: float | None = None
    bytes_up: int | None = None
    memory: int | None = None
    hand_memory: int | None = None
    note: str = ""
    failed: bool = False


def summarise(times: Times, cohort: int) -> dict[str, float | int]:
    """Take medians over the pairs.

    >>> found = summarise(Times([0.02, 0.03, 0.06], [0.01, 0.01, 0.02]), cohort=10)
    >>> found["ratio"], found["ratio_of_least"], round(found["extra_ms_per_cohort"])
    (3.0, 2.0, 20)
    """
    pairs, median = list(zip(times.runner, times.hand, strict=True)), statistics.median
    ratios = [a / b for a, b in pairs]
    return {
        "pairs": len(pairs),
        "hand_ms": 1e3 * median(times.hand),
        "runner_ms": 1e3 * median(times.runner),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_of_least": min(times.runner) / min(times.hand),
        "extra_ms_per_cohort": 1e3 * median(a - b for a, b in pairs) / -(-CLIENTS // cohort),
    }


def outcome(trained: Trained, hand: Trained) -> dict[str, float | int | None]:
    """How a runner ended: bytes, and the largest difference of its weights to the loop's."""
    if trained.weights is None or hand.weights is None:
        return {"weights_differ": None, "bytes_up": trained.bytes_up}
    return {
        "weights_differ": float((trained.weights - hand.weights).abs().max()),
        "bytes_up": trained.bytes_up,
    }
