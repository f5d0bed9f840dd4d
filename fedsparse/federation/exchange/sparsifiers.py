"""Sparsifiers (``conf/exchange``): they choose the coordinates that a client sends, for each round and client.

To add one, write a class like these, a YAML beside the others, and a row in the contract test,
``tests/federation/test_exchange_contract.py``.

Shapes: n coordinates that a client may send, in the same order on both sides; T tensors that they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_flag, check_number
from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.core.space import Patterns, listed, matches
from fedsparse.core.transfer import on_device
from fedsparse.federation.exchange.fractions import Fraction, check_fraction, fraction_of
from fedsparse.federation.exchange.scores import TOLERANCE, at_least, kept, score, select
from fedsparse.masks.topk import best


@dataclass(frozen=True)
class Layout:
    """The tensors that n coordinates belong to.

    Attributes:
        names: of T tensors.
        owner: int64 (n,), ascending, the tensor of each coordinate.

    """

    names: tuple[str, ...]
    owner: Tensor

    def at(self, index: Tensor | None) -> Layout:
        """Restrict the layout to some positions; None keeps all."""
        return self if index is None else Layout(self.names, self.owner[index])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each of T tensors; the host waits once for the device of ``owner``."""
        ends = torch.arange(len(self.names), device=self.owner.device)
        return tuple(torch.searchsorted(self.owner, ends, right=True).diff(prepend=ends.new_zeros(1)).tolist())


@dataclass(frozen=True)
class Sender:
    """The client that sends, and the round, both from 0."""

    client: int
    round: int


class Sparsifier(Protocol):
    """Chooses the coordinates that one client sends.

    Attributes:
        shared: whether the receiver computes the same choice, without values, so that no positions travel.

    """

    shared: bool

    def mark(self, theta: Tensor, start: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark the coordinates to send, bool (n,), from values after training and before it, both (n,)."""


class TopK:
    """Sends a fraction of the coordinates, those with the highest scores; exactly floor(fraction * n + 0.5).

    Args:
        by: one of ``SCORES``.
        fraction: of the row, or of each tensor; see ``fraction_of``.
        scope: ``global`` or ``tensor``.
        compat: ``original`` marks as FL4Health's sparse exchanger: ceil(fraction * n), and all ties with the lowest;
            never a value of 0.

    Raises:
        ValueError: an option outside these choices.

    """

    shared = False

    def __init__(
        self, by: str = "largest_change", fraction: Fraction = 0.1, scope: str = "global", compat: str | None = None
    ) -> None:
        score(by)
        check_fraction(fraction)
        check_choice("exchange.scope", scope, "global", "tensor")
        check_choice("exchange.compat", compat, None, "original")
        self.by, self.fraction, self.scope, self.compat = by, fraction, scope, compat

    def mark(self, theta: Tensor, start: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark the highest scores of the row, or of each tensor."""
        share = fraction_of(self.fraction, sender.round, sender.client)
        if not len(theta):
            return torch.zeros_like(theta, dtype=torch.bool)
        if self.compat:
            return at_least(score(self.by)(theta, start), share) & (theta != 0)
        if self.scope == "global":
            return select(self.by, theta, start, share)
        parts = [part.split(layout.sizes) for part in (theta, start)]
        pairs = zip(*parts, strict=True)
        return torch.cat([select(self.by, now, start, share) for now, start in pairs if len(now)])


class RandomK:
    """Sends random coordinates, drawn for each round and client from a seed that both sides have: no positions travel.

    Args:
        fraction: of the coordinates; see ``fraction_of``.
        seed: the run's.

    """

    shared = True

    def __init__(self, fraction: Fraction = 0.1, seed: int = 0) -> None:
        check_fraction(fraction)
        self.fraction, self.seed = fraction, seed

    def mark(self, theta: Tensor, start: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark a random fraction of the coordinates."""
        k = kept(fraction_of(self.fraction, sender.round, sender.client), len(theta)) if len(theta) else 0
        stream = torch_generator(self.seed, Purpose.EXCHANGE, sender.round, sender.client)
        marks = torch.zeros(len(theta), dtype=torch.bool)
        marks[torch.randperm(len(theta), generator=stream)[:k]] = True
        return on_device(marks, theta.device)


class Threshold:
    """Sends coordinates whose score is at least a threshold; a client may send nothing.

    Args:
        threshold: of the magnitude that ``by`` names; ``smallest_*`` scores send magnitudes up to it.
        by: one of ``SCORES``.

    """

    shared = False

    def __init__(self, threshold: float = 1e-3, by: str = "largest_change") -> None:
        check_number("exchange.threshold", threshold)
        self.score, self.least = score(by), -threshold if by.startswith("smallest") else threshold

    def mark(self, theta: Tensor, start: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Compare every score with the threshold."""
        return self.score(theta, start) >= self.least


class Layers:
    """Sends whole tensors by their drift, the L2 norm of their change.

    Args:
        threshold: drift above which a tensor is sent; None for a share of the tensors.
        percentage: ceil(percentage * T) tensors are sent, in (0, 1].
        more: whether tensors with more drift are sent; else those with less, or at most the threshold.
        normalise: whether drift is divided by the tensor's number of coordinates.

    Raises:
        ValueError: not exactly one of threshold and percentage, or one out of range.

    """

    shared = False

    def __init__(
        self,
        threshold: float | None = None,
        percentage: float | None = 0.5,
        more: bool = True,
        normalise: bool = True,
    ) -> None:
        if (threshold is None) == (percentage is None):
            raise ValueError("give either exchange.threshold or exchange.percentage, and set the other to null")
        check_number("exchange.percentage", percentage, above=0, most=1, null=True)
        check_number("exchange.threshold", threshold, least=0, null=True)
        check_flag("exchange.more", more)
        check_flag("exchange.normalise", normalise)
        self.threshold, self.percentage, self.more, self.normalise = threshold, percentage, more, normalise

    def mark(self, theta: Tensor, start: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark all coordinates of the chosen tensors."""
        drift = drifts(theta - start, layout, self.normalise)
        if self.threshold is not None:
            chosen = (drift > self.threshold) == self.more
        else:
            assert self.percentage is not None
            held = [size > 0 for size in layout.sizes]
            present = sum(held)
            k = min(present, max(1, math.ceil(present * self.percentage - TOLERANCE)))
            ranked = torch.where(on_device(torch.tensor(held), drift.device), drift if self.more else -drift, -math.inf)
            chosen = best(ranked, k, largest=True)
        return chosen[layout.owner]


def drifts(change: Tensor, layout: Layout, normalise: bool) -> Tensor:
    """Compute the L2 norm of each tensor's change, (n,) -> (T,); if ``normalise``, divided by the tensor's size."""
    squares = change.new_zeros(len(layout.names), dtype=torch.float64)
    squares.index_add_(0, layout.owner, change.double() ** 2)
    norms = squares.sqrt()
    return norms / on_device(torch.tensor(layout.sizes), norms.device).clamp(min=1) if normalise else norms


class Pattern:
    """Sends whole tensors by name; no positions travel.

    Args:
        names: glob patterns of the tensors that are sent.

    Raises:
        ValueError: names that are no glob patterns.

    """

    shared = True

    def __init__(self, names: Patterns) -> None:
        self.names = listed(names) if isinstance(names, Sequence) else []
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"exchange.names is {names!r}; it must be glob patterns of tensor names, such as [head.*]")

    def check(self, names: Sequence[str]) -> None:
        """Refuse patterns that match none of these tensors.

        Raises:
            ValueError: lists the first six.

        """
        if not any(matches(name, self.names) for name in names):
            listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(f"exchange.names={self.names} matches no tensor that trains and travels: {listed}")

    def mark(self, theta: Tensor, start: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark all coordinates of the matching tensors; with a mask of each client there may be none."""
        hits = on_device(torch.tensor([matches(name, self.names) for name in layout.names]), theta.device)
        return hits[layout.owner]
