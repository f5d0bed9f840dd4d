"""Times pieces of work beside each other, on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(works: Mapping[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Time each piece of work in turn, so that the machine's drift meets all alike; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(pairs + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: found[1:] for name, found in times.items()}
