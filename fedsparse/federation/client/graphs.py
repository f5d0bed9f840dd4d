"""CUDA graphs of the local training of a cohort: one launch instead of one for each kernel of each step.

A small GPU kernel runs for less time than its launch takes, so that the host is what is slow. A graph launches the
kernels of all local steps at once, and computes the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("fedsparse")

MOST = 4  # graphs that are kept; each keeps the memory of a step
LONGEST = 64  # local steps of a graph: each of some hundred kernels, which are written down one by one
Train = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Captured:
    """A graph, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    outputs: tuple[Tensor, ...]

    def replay(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Launch the graph on other samples; the next launch overwrites the outputs."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.outputs


def capture(train: Train, x: Tensor, y: Tensor) -> Captured:
    """Capture the training on samples, which is not carried out.

    Raises:
        RuntimeError: an operation cannot be captured, as it waits for the device.

    """
    graph, held = torch.cuda.CUDAGraph(), (x.clone(), y.clone())
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = train(*held)
    return Captured(graph, *held, outputs)


Capture = Callable[[Train, Tensor, Tensor], Captured]


class Graphs:
    """Replays local training. Of each kind the first is carried out, and the second captured; later ones are replayed.

    The first prepares what a capture may not: kernels are chosen, and memory is taken. What the host does between
    kernels is not repeated: a network whose forward depends on values of the device is not captured, and trains as
    before; one that changes Python numbers of its own is not to be replayed (``federation.graph=false``).

    Args:
        capture: captures a training; raises a RuntimeError where that is not possible.

    Attributes:
        works: whether what was captured so far could be; after a failure nothing is.

    """

    def __init__(self, capture: Capture = capture) -> None:
        self.capture, self.works = capture, True
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, Captured] = {}

    def run(
        self, train: Train, restart: Callable[[], None], x: Tensor, y: Tensor, kind: Hashable
    ) -> tuple[Tensor, ...]:
        """Train on samples, by a graph where there is one.

        Args:
            train: the local training: (x, y) -> tensors of the device.
            restart: undoes what a capture that fails has changed on the host.
            x: samples of all steps.
            y: their labels.
            kind: all else that decides which kernels run, and with which numbers.

        """
        key = (kind, x.shape, x.dtype, y.shape)
        if (found := self.captured.get(key)) is not None:
            return found.replay(x, y)
        if not self.works or key not in self.seen or len(self.captured) >= MOST:
            self.seen.add(key)
            return train(x, y)
        try:
            self.captured[key] = self.capture(train, x, y)
        except RuntimeError as error:  # as torch names what a capture does not allow
            self.works = False
            log.info("local steps are not replayed by a CUDA graph: %s", str(error).splitlines()[0])
            restart()
            return train(x, y)
        return self.captured[key].replay(x, y)
