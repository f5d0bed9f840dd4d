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
        hand_cpu_ms: processor time of a round of the hand-written loop, and ``runner_cpu_ms`` of the runner's process.
        hand_faults: pages mapped in a round of the loop, and ``runner_faults`` of the runner.
        sgd: torch's implementation of SGD that the loop was given, the fastest: ``fused``, ``foreach`` or ``plain``.
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
    hand_cpu_ms: float | None = None
    runner_cpu_ms: float | None = None
    hand_faults: float | None = None
    runner_faults: float | None = None
    sgd: str = ""
    extra_ms_per_cohort: float | None = None
    weights_differ: float | None = None
    bytes_up: int | None = None
    memory: int | None = None
    hand_memory: int | None = None
    note: str = ""
    failed: bool = False


def summarise(times: Times, cohort: int) -> dict[str, float | int]:
    """Take medians over the pairs.

    >>> from fedsparse.bench.pairs import Spent
    >>> pair = [[Spent(s, s / 2, pages) for s in seconds] for seconds, pages in (([2, 3, 6], 70), ([1, 1, 2], 9))]
    >>> found = summarise(Times(*pair), cohort=10)
    >>> found["ratio"], found["ratio_of_least"], found["extra_ms_per_cohort"], found["runner_faults"]
    (3.0, 2.0, 2000.0, 70)
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
        "hand_cpu_ms": 1e3 * median(spent.cpu for spent in times.of_hand),
        "runner_cpu_ms": 1e3 * median(spent.cpu for spent in times.of_runner),
        "hand_faults": median(spent.faults for spent in times.of_hand),
        "runner_faults": median(spent.faults for spent in times.of_runner),
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
