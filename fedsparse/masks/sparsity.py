"""How many coordinates train, and over what they are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

SCOPES = ("global", "tensor", "shira")


@dataclass(frozen=True)
class Sparsity:
    """How many coordinates train, and over what they are counted: what ``conf/sparsity/*.yaml`` instantiates.

    With ``scope=shira`` a linear layer trains exactly rank * (in + out) of its weights, as many as LoRA of that rank
    has (SHiRA, Bhardwaj et al. 2024); ``ratio`` is not read, and what is counted but is no weight of a linear layer
    does not train.

    Args:
        ratio: fraction of the counted coordinates that does not train, in [0, 1).
        mode: ``freeze``: a coordinate outside the mask keeps its pre-trained value.
        scope: ``global`` counts over the whole row, ``tensor`` tensor by tensor, ``shira`` layer by layer.
        unit: ``coordinate``, or ``output``: an index of a weight's first dimension together with its bias.
        always_train: glob patterns of parameter names that train and are not counted.
        rank: with ``scope=shira``: how many weights for each input and output of a layer.

    Raises:
        ValueError: an option outside these choices; the line names it.

    """

    ratio: float = 0.8
    mode: str = "freeze"
    scope: str = "global"
    unit: str = "coordinate"
    always_train: str | Sequence[str] = ()
    rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is not a choice."""
        number = isinstance(self.ratio, Real) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio < 1:
            raise ValueError(f"sparsity.ratio must be a number in [0, 1), not {self.ratio!r}")
        if self.mode != "freeze":
            raise ValueError(f"sparsity.mode knows only 'freeze' for now, not {self.mode!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"sparsity.scope must be 'global', 'tensor' or 'shira', not {self.scope!r}")
        if self.unit not in ("coordinate", "output"):
            raise ValueError(f"sparsity.unit must be 'coordinate' or 'output', not {self.unit!r}")
        self._check_patterns()
        self._check_rank()

    @property
    def density(self) -> float:
        """Fraction of the counted coordinates that trains: 1 - ratio."""
        return 1 - self.ratio

    @property
    def words(self) -> dict[str, str]:
        """Say it in a mask's metadata: the ratio, or scope and rank.

        >>> Sparsity(0.8).words, Sparsity(scope="shira", rank=4).words
        ({'ratio': '0.8'}, {'scope': 'shira', 'rank': '4'})
        """
        return {"scope": "shira", "rank": str(self.rank)} if self.scope == "shira" else {"ratio": str(self.ratio)}

    def _check_patterns(self) -> None:
        listed = [self.always_train] if isinstance(self.always_train, str) else self.always_train
        if not isinstance(listed, Sequence) or not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"sparsity.always_train must be glob patterns of names, not {self.always_train!r}")

    def _check_rank(self) -> None:
        """Ask for a rank where it is read, and refuse it where it is not."""
        if self.scope != "shira":
            if self.rank is not None:
                raise ValueError(f"sparsity.rank={self.rank!r} is read with sparsity.scope=shira only; leave it null")
            return
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"sparsity.rank must be a whole number of at least 1 with scope=shira, not {self.rank!r}")
        if self.unit != "coordinate":
            raise ValueError(f"sparsity.unit must be 'coordinate' with sparsity.scope=shira, not {self.unit!r}")
