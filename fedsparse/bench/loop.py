"""The hand-written loop that every runner is held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.bench.pairs import Feed, Trained
from fedsparse.bench.problems import LR, MOMENTUM, Batches, Task

Options = dict[str, bool]
SGDS: tuple[Options, ...] = ({"fused": True}, {"foreach": True}, {"foreach": False})


class HandWritten:
    """The same rounds as a person would write them: one model, torch's SGD at its fastest, in-place copies.

    Args:
        net: a network of its own.
        options: of ``torch.optim.SGD``, such as ``fused`` or ``foreach``.

    """

    def __init__(self, net: nn.Module, options: Options) -> None:
        self.net = net.train()
        self.parameters: list[Tensor] = list(net.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, **options)

    def round(self, clients: Batches) -> None:
        """Train every client on its batches, and average."""
        torch._foreach_zero_(self.sums)
        for batches in clients:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.start)
            self.optimizer.state.clear()
            for x, y in batches:
                F.cross_entropy(self.net(x), y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_add_(self.sums, self.parameters, alpha=1.0 / len(clients))
        torch._foreach_copy_(self.start, self.sums)

    @property
    def weights(self) -> Tensor:
        """The global model (P,), in the order of the network's parameters."""
        return flat(self.start)


def flat(tensors: list[Tensor]) -> Tensor:
    """Join tensors into one row (P,)."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def least(trial: HandWritten, batches: Batches, times: int = 15, seconds: float = 2.0) -> float:
    """Seconds of the fastest of so many rounds after a first one; of fewer when they take longer than some seconds."""
    first = timed(lambda: trial.round(batches))
    return min(timed(lambda: trial.round(batches)) for _ in range(max(2, min(times, int(seconds / first)))))


def fastest(task: Task, measure: Callable[[HandWritten, Batches], float] = least) -> Options:
    """Choose the fastest of torch's implementations of SGD for this model; ``measure`` gives the seconds of a round."""
    batches = task.batches(0)[:1]
    times = {i: measure(HandWritten(task.net(), options), batches) for i, options in enumerate(SGDS)}
    return SGDS[min(times, key=lambda i: times[i])]


def named(options: Options) -> str:
    """Name an implementation of SGD.

    >>> [named(options) for options in SGDS]
    ['fused', 'foreach', 'plain']
    """
    return next((name for name, chosen in options.items() if chosen), "plain")


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def train(task: Task, feed: Feed) -> Trained:
    """Run the loop alone, as a runner like the others."""
    hand = HandWritten(task.net(), feed.options)
    for _ in range(task.rounds):
        feed.tick()
        hand.round(feed.batches)
    return Trained(hand.weights)
