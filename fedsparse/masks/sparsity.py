"""How many coordinates train, and over what they are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from fedsparse.core.checks import check_choice, check_share, check_whole
from fedsparse.core.space import matches
from fedsparse.masks.gradual import Gradual

SCOPES = ("global", "tensor", "shira")
ONE = 1e-9  # a share that is one coordinate, rounded up


@dataclass(frozen=True)
class Sparsity:
    """How many coordinates train, and over what they are counted: what ``conf/sparsity/*.yaml`` instantiates.

    With ``scope=shira`` a linear layer trains exactly rank * (in + out) of its weights, as many as LoRA of that rank
    has (SHiRA, Bhardwaj et al. 2024); ``ratio`` is not read, and what is counted but is no weight of a linear layer
    does not train.

    Args:
        ratio: fraction of the counted coordinates that does not train, in [0, 1).
        mode: ``freeze``: a coordinate outside the mask keeps its pre-trained value; ``prune``: it is 0.
        scope: ``global`` counts over the whole row, ``tensor`` tensor by tensor, ``shira`` layer by layer.
        unit: ``coordinate``, or ``output``: an index of a weight's first dimension together with its bias.
        always_train: glob patterns of parameter names that train and are not counted.
        rank: with ``scope=shira``: how many weights for each input and output of a layer.
        min_density: every counted tensor keeps at least this share of its coordinates (with ``unit=output`` of its
            units), rounded up; what that costs is taken from the lowest-scored elsewhere. 0 asks for nothing, and
            with ``mode=prune`` for one coordinate, so that no tensor dies.
        schedule: how the ratio grows over the rounds (``Gradual``, or a mapping of its options); None: it is constant.
        renew_every: the mask is chosen anew every so many rounds; None: only where the schedule changes.
        attention: the network's attention layers, whose units are heads with ``unit=output``; filled in by the run.

    Raises:
        ValueError: an option outside these choices; the line names it.

    """

    ratio: float = 0.8
    mode: str = "freeze"
    scope: str = "global"
    unit: str = "coordinate"
    always_train: str | Sequence[str] = ()
    rank: int | None = None
    min_density: float = 0.0
    schedule: Gradual | None = None
    renew_every: int | None = None
    attention: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is not a choice."""
        check_share("sparsity.ratio", self.ratio)
        check_choice("sparsity.mode", self.mode, "freeze", "prune")
        check_choice("sparsity.scope", self.scope, *SCOPES)
        check_choice("sparsity.unit", self.unit, "coordinate", "output")
        self._check_patterns()
        self._check_rank()
        self._check_min_density()
        self._check_schedule()

    @property
    def density(self) -> float:
        """Fraction of the counted coordinates that trains: 1 - ratio."""
        return 1 - self.ratio

    @property
    def least(self) -> float:
        """Share that every tensor keeps: ``min_density``; where the rest is zero, at least one coordinate of each.

        >>> Sparsity(0.8).least, Sparsity(0.8, mode="prune").least, Sparsity(0.8, min_density=0.1).least
        (0.0, 1e-09, 0.1)
        """
        dies = self.mode == "prune" and self.scope == "global"
        return self.min_density or (ONE if dies else 0.0)

    @property
    def constant(self) -> bool:
        """Whether one mask is chosen for all rounds."""
        return self.schedule is None and self.renew_every is None

    def at(self, round: int) -> Sparsity:
        """Give the sparsity of a round, counted from 0: the ratio that its schedule has come to, and no schedule.

        >>> growing = Sparsity(0.8, schedule=Gradual(steps=2))
        >>> [round(growing.at(t).ratio, 3) for t in range(4)]
        [0.0, 0.7, 0.8, 0.8]
        """
        if self.schedule is None:
            return self
        return replace(self, ratio=self.schedule.ratio(round, self.ratio), schedule=None)

    def renews(self, round: int) -> bool:
        """Whether the mask is chosen anew before a round, counted from 0; that of round 0 is chosen with ``at(0)``.

        >>> [round for round in range(6) if Sparsity(renew_every=2, schedule=Gradual(steps=1)).renews(round)]
        [1, 2, 4]
        """
        if round < 1:
            return False
        scheduled = self.schedule is not None and self.schedule.changes(round)
        return scheduled or (self.renew_every is not None and round % self.renew_every == 0)

    @property
    def metadata(self) -> dict[str, str]:
        """What a mask file says of it: the ratio, or scope and rank.

        >>> Sparsity(0.8).metadata, Sparsity(scope="shira", rank=4).metadata
        ({'ratio': '0.8'}, {'scope': 'shira', 'rank': '4'})
        """
        return {"scope": "shira", "rank": str(self.rank)} if self.scope == "shira" else {"ratio": str(self.ratio)}

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse patterns of ``always_train`` that match no parameter of a network.

        Raises:
            ValueError: one line with the first of them, and names that there are.

        """
        listed = [self.always_train] if isinstance(self.always_train, str) else self.always_train
        for pattern in listed:
            if not any(matches(name, pattern) for name in names):
                some = ", ".join(names[-4:])
                raise ValueError(
                    f"sparsity.always_train: {pattern} matches no parameter; the last of them are {some}; by default "
                    "it is model.head, which names the model's last layer"
                )

    def _check_patterns(self) -> None:
        listed = [self.always_train] if isinstance(self.always_train, str) else self.always_train
        if not isinstance(listed, Sequence) or not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"sparsity.always_train is {self.always_train!r}; it must be glob patterns of names")

    def _check_rank(self) -> None:
        """Ask for a rank where it is read, and refuse it where it is not."""
        if self.scope != "shira":
            if self.rank is not None:
                raise ValueError(f"sparsity.rank={self.rank!r} is read with sparsity.scope=shira only; leave it null")
            return
        check_whole("sparsity.rank, with sparsity.scope=shira,", self.rank, 1)
        if self.unit != "coordinate":
            raise ValueError(f"sparsity.unit is {self.unit!r}; with sparsity.scope=shira it must be coordinate")

    def _check_min_density(self) -> None:
        """Compare as typed: in binary 1 - 0.9 is less than 0.1."""
        check_share("sparsity.min_density", self.min_density)
        if not self.min_density:
            return
        if self.scope != "global":
            raise ValueError(
                f"sparsity.min_density={self.min_density!r} needs sparsity.scope=global, where one tensor pays for "
                f"another; with sparsity.scope={self.scope} leave it 0"
            )
        if as_typed(self.min_density) + as_typed(self.ratio) > 1:
            text = f"sparsity.min_density={self.min_density!r} is more than the density 1 - {self.ratio!r}"
            raise ValueError(f"{text}; lower it, or sparsity.ratio")

    def _check_schedule(self) -> None:
        """Build the schedule of a mapping, and refuse one that would lead to fewer frozen coordinates."""
        if self.renew_every is not None:
            check_whole("sparsity.renew_every", self.renew_every, 1)
        if self.schedule is None:
            return
        if not isinstance(self.schedule, Gradual):
            object.__setattr__(self, "schedule", _gradual(self.schedule))
        if self.scope == "shira":
            raise ValueError("sparsity.schedule changes the ratio, which sparsity.scope=shira does not read")
        if self.schedule.initial > self.ratio:
            text = f"sparsity.schedule.initial={self.schedule.initial!r} is more than sparsity.ratio={self.ratio!r}"
            raise ValueError(f"{text}, to which it is to grow")


def as_typed(number: float) -> Fraction:
    """Take a number as its shortest decimal form says, exactly.

    >>> as_typed(0.1) * 30 == 3
    True
    """
    return Fraction(repr(float(number)))


def _gradual(options: Any) -> Gradual:
    """Build a schedule from a node of the configuration.

    Raises:
        ValueError: no node of the schedule's options.

    """
    known = tuple(Gradual.__dataclass_fields__)
    if not isinstance(options, Mapping) or not set(options) <= set(known):
        raise ValueError(f"sparsity.schedule is {options!r}; it must be null or a node of {', '.join(known)}")
    return Gradual(**options)
