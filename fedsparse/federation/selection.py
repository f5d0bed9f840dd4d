"""Which coordinates a client sends: rules that choose anew for each round and client.

Shapes: n coordinates that a client may send, in the order that both sides know, T tensors that they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsparse.keys import Purpose, torch_generator
from fedsparse.masks.topk import count, mark
from fedsparse.space import Patterns, matches

Score = Callable[[Tensor, Tensor], Tensor]
Fraction = float | Sequence[float] | Mapping[int, float]
_TOLERANCE = 1e-9  # 0.1 * 30 is 3.0000000000000004, and yet three of thirty are meant

# the higher, the sooner it is sent; from a client's values now and those it started from (Zhou et al. 2019, section 3)
SCORES: dict[str, Score] = {
    "largest_final": lambda theta, anchor: theta.abs(),
    "smallest_final": lambda theta, anchor: -theta.abs(),
    "largest_change": lambda theta, anchor: (theta - anchor).abs(),
    "smallest_change": lambda theta, anchor: -(theta - anchor).abs(),
    "largest_increase": lambda theta, anchor: theta.abs() - anchor.abs(),
    "smallest_increase": lambda theta, anchor: anchor.abs() - theta.abs(),
}


def score(rule: str) -> Score:
    """Find the score of a rule by its name.

    Raises:
        ValueError: another name.

    """
    if rule not in SCORES:
        raise ValueError(f"exchange.by is {rule!r}; it must be one of {', '.join(SCORES)}")
    return SCORES[rule]


def select(rule: str, theta: Tensor, anchor: Tensor, fraction: float) -> Tensor:
    """Mark the coordinates of each row that a rule ranks first: exactly floor(fraction * n + 0.5), at least one.

    Ties go to the lowest index.

    Args:
        rule: one of ``SCORES``, such as ``largest_change``.
        theta: (*, n), values after local training.
        anchor: (*, n), values that the clients started from.
        fraction: share to mark, above 0 and at most 1.

    Returns:
        bool (*, n).

    Raises:
        ValueError: an unknown rule or a fraction out of range.

    >>> select("largest_change", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0]), 0.34)
    tensor([False,  True, False])

    """
    scores = score(rule)(theta, anchor)
    k = kept(fraction, scores.shape[-1])
    rows = scores.reshape(-1, scores.shape[-1])
    return torch.stack([mark([row], k, largest=True)[0][0] for row in rows]).view(scores.shape)


def kept(fraction: float, n: int) -> int:
    """Round a fraction of ``n`` half up, to at least one.

    Raises:
        ValueError: a fraction that is not above 0 and at most 1.

    """
    if not 0 < fraction <= 1:
        raise ValueError(f"exchange.fraction is {fraction!r}; it must be above 0 and at most 1")
    return min(n, max(1, count(fraction, n)))


def fraction_of(fraction: Fraction, round: int, client: int) -> float:
    """Read ``exchange.fraction``: a number, a list with one for each client, or a mapping from a round on.

    >>> fraction_of({0: 0.5, 3: 0.1}, 4, 0), fraction_of([0.2, 0.4], 0, 1), fraction_of(0.3, 0, 0)
    (0.1, 0.4, 0.3)
    """
    if isinstance(fraction, Mapping):
        return fraction[max(start for start in fraction if int(start) <= round)]
    return fraction[client] if isinstance(fraction, Sequence) else fraction


def check_fraction(fraction: Fraction, clients: int | None = None) -> None:
    """Refuse what is no fraction, before anything is trained.

    Raises:
        ValueError: one line that says what ``exchange.fraction`` may be.

    """
    listed = list(fraction.values()) if isinstance(fraction, Mapping) else fraction
    numbers = listed if isinstance(listed, Sequence) else [listed]
    good = all(isinstance(f, int | float) and not isinstance(f, bool) and 0 < f <= 1 for f in numbers)
    if isinstance(fraction, Mapping):
        good = good and 0 in fraction and all(isinstance(start, int) and start >= 0 for start in fraction)
    if not good or not len(numbers):
        raise ValueError(
            f"exchange.fraction is {fraction!r}; it must be above 0 and at most 1: a number, a list with one for each "
            "client, or a mapping from a round on, such as {0: 0.5, 5: 0.1}"
        )
    listed_for = len(fraction) if isinstance(fraction, Sequence) else clients
    if clients not in (None, listed_for):
        raise ValueError(f"exchange.fraction lists {listed_for} clients; there are {clients}")


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
        """Keep some of the coordinates."""
        return self if index is None else Layout(self.names, self.owner[index])

    def sizes(self) -> Tensor:
        """Coordinates of each tensor: int64 (T,)."""
        return torch.bincount(self.owner, minlength=len(self.names))


@dataclass(frozen=True)
class Sender:
    """Who sends, and when."""

    client: int
    round: int


class Rule(Protocol):
    """Chooses what one client sends.

    Attributes:
        shared: whether the receiver can tell without being told, so that positions need not travel.

    """

    shared: bool

    def mark(self, theta: Tensor, anchor: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark what is sent, bool (n,), of values now and at the start, both (n,)."""


class TopK:
    """The coordinates that a score ranks first, exactly as many as the fraction says.

    Args:
        by: one of ``SCORES``.
        fraction: how many, over the whole row or of each tensor; see ``fraction_of``.
        scope: ``global`` or ``tensor``.
        compat: ``original`` marks as FL4Health's sparse exchanger does: ceil(fraction * n), and all ties with the last;
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
        if scope not in ("global", "tensor"):
            raise ValueError(f"exchange.scope is {scope!r}; it must be global or tensor")
        if compat not in (None, "original"):
            raise ValueError(f"exchange.compat is {compat!r}; it must be null or original")
        self.by, self.fraction, self.scope, self.compat = by, fraction, scope, compat

    def mark(self, theta: Tensor, anchor: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Rank all coordinates, or those of each tensor."""
        share = fraction_of(self.fraction, sender.round, sender.client)
        if not len(theta):
            return torch.zeros_like(theta, dtype=torch.bool)
        if self.compat:
            return at_least(score(self.by)(theta, anchor), share) & (theta != 0)
        if self.scope == "global":
            return select(self.by, theta, anchor, share)
        parts = [part.split(layout.sizes().tolist()) for part in (theta, anchor)]
        pairs = zip(*parts, strict=True)
        return torch.cat([select(self.by, now, start, share) for now, start in pairs if len(now)])


def at_least(scores: Tensor, fraction: float) -> Tensor:
    """Mark the ceil(fraction * n) best of n scores and whatever ties with the last of them: bool (n,).

    >>> at_least(torch.tensor([1.0, 2.0, 2.0, 3.0]), 0.5)
    tensor([False,  True,  True,  True])
    """
    k = max(1, math.ceil(len(scores) * fraction - _TOLERANCE))
    return scores >= scores.kthvalue(len(scores) - k + 1).values


class RandomK:
    """Random coordinates, drawn anew for each round and client from a seed that both sides know: no positions travel.

    Args:
        fraction: how many; see ``fraction_of``.
        seed: the run's.

    """

    shared = True

    def __init__(self, fraction: Fraction = 0.1, seed: int = 0) -> None:
        check_fraction(fraction)
        self.fraction, self.seed = fraction, seed

    def mark(self, theta: Tensor, anchor: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark as many as the fraction says."""
        k = kept(fraction_of(self.fraction, sender.round, sender.client), len(theta)) if len(theta) else 0
        stream = torch_generator(self.seed, Purpose.EXCHANGE, sender.round, sender.client)
        marks = torch.zeros(len(theta), dtype=torch.bool)
        marks[torch.randperm(len(theta), generator=stream)[:k]] = True
        return marks.to(theta.device)


class Threshold:
    """Coordinates whose score is at least a threshold; a client may send nothing.

    Args:
        threshold: of the magnitude that ``by`` names: for ``smallest_*`` rules at most so much is sent.
        by: one of ``SCORES``.

    """

    shared = False

    def __init__(self, threshold: float = 1e-3, by: str = "largest_change") -> None:
        if not _number(threshold) or not math.isfinite(threshold):
            raise ValueError(f"exchange.threshold is {threshold!r}; it must be a finite number")
        self.score, self.least = score(by), -threshold if by.startswith("smallest") else threshold

    def mark(self, theta: Tensor, anchor: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Compare every score with the threshold."""
        return self.score(theta, anchor) >= self.least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Layers:
    """Whole tensors by their drift, the L2 norm of their change.

    Args:
        threshold: drift above which a tensor is sent; None to send a share of the tensors.
        percentage: ceil(percentage * T) tensors are sent, in (0, 1].
        more: whether those that drifted more are sent; else less, or at most the threshold.
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
        if percentage is not None and not (_number(percentage) and 0 < percentage <= 1):
            raise ValueError(f"exchange.percentage is {percentage!r}; it must be above 0 and at most 1")
        if threshold is not None and not (_number(threshold) and threshold >= 0):
            raise ValueError(f"exchange.threshold is {threshold!r}; it must be 0 or more")
        for key, value in (("more", more), ("normalise", normalise)):
            if not isinstance(value, bool):
                raise ValueError(f"exchange.{key} is {value!r}; it must be true or false")
        self.threshold, self.percentage, self.more, self.normalise = threshold, percentage, more, normalise

    def mark(self, theta: Tensor, anchor: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark all coordinates of the tensors that are sent."""
        sizes = layout.sizes()
        drift = drifts(theta - anchor, layout, self.normalise)
        if self.threshold is not None:
            chosen = (drift > self.threshold) == self.more
        else:
            assert self.percentage is not None
            present = int((sizes > 0).sum())
            k = min(present, max(1, math.ceil(present * self.percentage - _TOLERANCE)))
            worst = torch.tensor(-math.inf)
            ranked = torch.where(sizes > 0, drift if self.more else -drift, worst.to(drift))
            chosen = mark([ranked], k, largest=True)[0][0]
        return chosen[layout.owner]


def drifts(change: Tensor, layout: Layout, normalise: bool) -> Tensor:
    """L2 norm of each tensor's change, (n,) -> (T,), divided by its size if so wished."""
    squares = change.new_zeros(len(layout.names), dtype=torch.float64)
    squares.index_add_(0, layout.owner, change.double() ** 2)
    norms = squares.sqrt()
    return norms / layout.sizes().clamp(min=1) if normalise else norms


class Pattern:
    """Whole tensors by name; both sides know which.

    Args:
        names: glob patterns of the tensors that are sent.

    Raises:
        ValueError: something else.

    """

    shared = True

    def __init__(self, names: Patterns) -> None:
        self.names = [names] if isinstance(names, str) else list(names or ())
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"exchange.names is {names!r}; it must be glob patterns of tensor names, such as [head.*]")

    def check(self, names: Sequence[str]) -> None:
        """Refuse patterns that match no tensor of these.

        Raises:
            ValueError: lists the first few.

        """
        if not any(matches(name, self.names) for name in names):
            listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(f"exchange.names={self.names} matches no tensor that trains and travels: {listed}")

    def mark(self, theta: Tensor, anchor: Tensor, layout: Layout, sender: Sender) -> Tensor:
        """Mark all coordinates of the tensors whose name matches; a client's own mask may leave it none of them."""
        hits = torch.tensor([matches(name, self.names) for name in layout.names], device=theta.device)
        return hits[layout.owner]
