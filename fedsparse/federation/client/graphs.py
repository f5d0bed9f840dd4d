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


def capture(train: Train, restart: Callable[[], None], x: Tensor, y: Tensor) -> Captured:
    """Capture the training on samples, which is not carried out: what the rehearsals before it did is undone.

    Kernels are chosen in the first rehearsal, and memory is taken. The second finds out whether an operation waits for
    the device, which a capture does not survive: a generator of random numbers stays as it was in its midst.

    Raises:
        RuntimeError: an operation waits for the device, or cannot be captured.

    """
    held, mode = (x.clone(), y.clone()), torch.cuda.get_sync_debug_mode()
    train(*held)
    restart()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(*held)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    restart()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = train(*held)
    return Captured(graph, *held, outputs)


Capture = Callable[[Train, Callable[[], None], Tensor, Tensor], Captured]


class Graphs:
    """Replays local training: of each kind it is captured once, before the first clients of it train.

    So the bits of a run do not depend on when it was resumed: a convolution may have others in a graph. A network
    whose forward waits for the device, as it reads values there, is not captured, and trains step by step. One that
    changes Python numbers of its own is not to be replayed (``federation.graph=false``): the host's work between
    kernels is not repeated.

    Args:
        capture: captures a training; raises a RuntimeError where that is not possible.

    Attributes:
        works: whether what was captured so far could be; after a failure nothing is.

    """

    def __init__(self, capture: Capture = capture) -> None:
        self.capture, self.works = capture, True
        self.captured: dict[Hashable, Captured] = {}

    def run(
        self, train: Train, hold: Callable[[], Callable[[], None]], x: Tensor, y: Tensor, kind: Hashable
    ) -> tuple[Tensor, ...]:
        """Train on samples, by a graph where there is one.

        Args:
            train: the local training: (x, y) -> tensors of the device.
            hold: notes the state before a rehearsal; what it returns restores it.
            x: samples of all steps.
            y: their labels.
            kind: all else that decides which kernels run, and with which numbers.

        """
        key = (kind, x.shape, x.dtype, y.shape)
        if self.works and key not in self.captured and len(self.captured) < MOST:
            restart = hold()
            try:
                self.captured[key] = self.capture(train, restart, x, y)
            except RuntimeError as error:  # as torch names what a capture does not allow
                self.works = False
                log.info("local steps are not replayed by a CUDA graph: %s", str(error).splitlines()[0])
            restart()
        return self.captured[key].replay(x, y) if key in self.captured else train(x, y)
