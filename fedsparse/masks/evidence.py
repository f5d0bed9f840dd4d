"""What a mask rule scores from: one evidence object, and the declarations of what of it a rule needs.

Shapes: ``P`` coordinates of the space, ``n`` of them that train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number, check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.masks.sparsity import Sparsity


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Evidence:
    """What a mask is chosen by.

    Attributes:
        space: names and shapes of the coordinates.
        row: the values that are scored (P,): pre-trained, or the global ones of a later round.
        sparsity: how many train, of this choice.
        generator: the randomness of the rule; by default one of seed 0.
        observed: for ``Batches`` float64 (P,), what ``observe`` sums up to; for ``Thinning`` bool (P,), what is left,
            or float64 (P,), the order in which coordinates are given up; for ``Exploration`` (P,), the mean over
            clients of the squared deviation from their common start.
        updates: float64 (P,), what learning rounds gathered (``Updates``); None before the first.

    """

    space: ParamSpace
    row: Tensor
    sparsity: Sparsity
    generator: torch.Generator = field(default_factory=_seeded)
    observed: Tensor | None = None
    updates: Tensor | None = None

    @property
    def measured(self) -> Tensor:
        """What was observed (P,).

        Raises:
            ValueError: nothing was.

        """
        if self.observed is None:
            raise ValueError(
                "evidence.observed is None; for a rule that needs batches, thinning or an exploration it must be what "
                "these measured, (P,)"
            )
        return self.observed


@dataclass(frozen=True)
class Batches:
    """A rule's need of calibration batches: ``observe`` is summed over batches, clients and rounds."""

    clients: ClassVar[bool] = True


@dataclass(frozen=True)
class Thinning:
    """A rule's need of rounds in which coordinates are given up, each round scored anew among those that are left.

    After round r of R, density^(r / R) of the coordinates are left. What is given up never returns.

    Args:
        shrink: factor on the values that are given up, while the others are scored: 0 (SynFlow) to 1.
        rounds: R, of the network alone: ``observe`` is called once a round, on one input of which the shape is meant,
            and no client is asked; None: ``calibration.rounds`` on the clients' batches.
        order: whether the order in which coordinates are given up is kept for a sparsity that grows, so that the masks
            of all ratios on the way can be chosen from it. Without it a mask is chosen once.

    Raises:
        ValueError: a number out of range.

    """

    shrink: float = 0.0
    rounds: int | None = None
    order: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no thinning."""
        check_number("Thinning.shrink", self.shrink, least=0, most=1)
        if self.rounds is not None:
            check_whole("Thinning.rounds", self.rounds, 1)

    @property
    def clients(self) -> bool:
        """Whether clients are asked."""
        return self.rounds is None


@dataclass(frozen=True)
class Exploration:
    """A rule's need of an explore phase: the mean over clients of the squared deviation of every coordinate."""


@dataclass(frozen=True)
class Updates:
    """A rule's need of the clients' updates in learning rounds: the weighted mean over clients of ``of_update``.

    Args:
        keep: ``sum`` over the rounds, or the ``last`` round alone.
        absent: what stands for a coordinate that did not train: ``zero``, or the ``mean`` of the absolute values of
            those that did, so that it can train again.

    Raises:
        ValueError: an option outside these choices.

    """

    keep: str = "sum"
    absent: str = "zero"

    def __post_init__(self) -> None:
        """Refuse what is not a choice."""
        check_choice("Updates.keep", self.keep, "sum", "last")
        check_choice("Updates.absent", self.absent, "zero", "mean")

    def elsewhere(self, mean: Tensor) -> float:
        """Choose the value of coordinates that did not train, beside the mean of the others (n,)."""
        return 0.0 if self.absent == "zero" else float(mean.abs().mean())

    def gather(self, before: Tensor | None, fresh: Tensor) -> Tensor:
        """Join a round, float64 (P,), with those before it."""
        return fresh if before is None or self.keep == "last" else before + fresh


Need = Batches | Thinning | Exploration | Updates
N = TypeVar("N", bound=Need)


def find(needs: Sequence[Need], kind: type[N]) -> N | None:
    """Find the need of one kind, if it is among them.

    >>> find((Exploration(), Updates("last")), Updates)
    Updates(keep='last', absent='zero')
    """
    return next((need for need in needs if isinstance(need, kind)), None)


def calibration(needs: Sequence[Need]) -> Batches | Thinning | None:
    """Find what is needed of the calibration; None: nothing is measured there."""
    return find(needs, Batches) or find(needs, Thinning)
