"""From scores to a mask: exactly k coordinates, ties to the lowest index.

Shapes: ``P`` coordinates of the space, ``n`` of them counted (not in ``always_train``), ``U`` output units, ``*`` any
leading dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fedsparse.space import ParamSpace, matches

TIED_SHARE = 0.01  # above this share of ties at the threshold, the order of the coordinates decides: worth a warning


def count(fraction: float, n: int) -> int:
    """Round a fraction of ``n`` half up: floor(fraction * n + 0.5).

    >>> count(0.5, 5)
    3
    """
    return math.floor(fraction * n + 0.5)


def top_fraction(scores: Tensor, fraction: float, *, largest: bool = True) -> Tensor:
    """Mark exactly k = floor(fraction * n + 0.5) of the last dimension's n scores, row by row.

    Ties go to the lowest index. The threshold comes from a partial selection and a running count shares out its ties,
    so nothing is sorted: 22 million float32 scores take about a second on one CPU core.

    Args:
        scores: (*, n), float32 or float64, infinities allowed.
        fraction: share to mark, in [0, 1].
        largest: whether the largest scores are marked, or the smallest.

    Returns:
        bool (*, n), k of every row True.

    Raises:
        ValueError: a fraction outside [0, 1], scores without a dimension, or NaN among the scores.

    >>> top_fraction(torch.tensor([1.0, 3.0, 2.0, 3.0]), 0.25)
    tensor([False,  True, False, False])

    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of scores to mark must lie in [0, 1], not {fraction!r}")
    _check(scores)
    k = count(fraction, scores.shape[-1])
    if k in (0, scores.shape[-1]):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    edge = _threshold(scores.detach(), k, largest)
    sure = scores > edge if largest else scores < edge
    tied = scores == edge
    return sure | (tied & (tied.cumsum(-1) <= k - sure.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class Sparsity:
    """How many coordinates train, and over what they are counted: what ``conf/sparsity/*.yaml`` instantiates.

    Args:
        ratio: fraction of the counted coordinates that does not train, in [0, 1).
        mode: ``freeze``: a coordinate outside the mask keeps its pre-trained value.
        scope: ``global`` counts over the whole row, ``tensor`` tensor by tensor.
        unit: ``coordinate``, or ``output``: an index of a weight's first dimension together with its bias.
        always_train: glob patterns of parameter names that train and are not counted.

    Raises:
        ValueError: an option outside these choices; the line names it.

    """

    ratio: float = 0.8
    mode: str = "freeze"
    scope: str = "global"
    unit: str = "coordinate"
    always_train: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what is not a choice."""
        number = isinstance(self.ratio, Real) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio < 1:
            raise ValueError(f"sparsity.ratio must be a number in [0, 1), not {self.ratio!r}")
        if self.mode != "freeze":
            raise ValueError(f"sparsity.mode knows only 'freeze' for now, not {self.mode!r}")
        if self.scope not in ("global", "tensor"):
            raise ValueError(f"sparsity.scope must be 'global' or 'tensor', not {self.scope!r}")
        if self.unit not in ("coordinate", "output"):
            raise ValueError(f"sparsity.unit must be 'coordinate' or 'output', not {self.unit!r}")
        self._check_patterns()

    @property
    def density(self) -> float:
        """Fraction of the counted coordinates that trains: 1 - ratio."""
        return 1 - self.ratio

    def _check_patterns(self) -> None:
        listed = [self.always_train] if isinstance(self.always_train, str) else self.always_train
        if not isinstance(listed, Sequence) or not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"sparsity.always_train must be glob patterns of names, not {self.always_train!r}")


def select(scores: Tensor, space: ParamSpace, sparsity: Sparsity, *, largest: bool) -> Tensor:
    """Choose the coordinates that train.

    Those matching ``sparsity.always_train`` train and are not counted. Of the other n, exactly
    floor(density * n + 0.5) are kept; with ``scope=tensor`` that formula holds tensor by tensor. With ``unit=output``
    whole units are taken in order of their mean score, as a prefix, while they fit into that number; it can then come
    out smaller, and with ``scope=tensor`` it is counted per weight and bias.

    Args:
        scores: (P,), one score for every coordinate.
        space: names and shapes of the coordinates.
        sparsity: how many, and over what.
        largest: whether the largest scores train, or the smallest.

    Returns:
        bool (P,), True where a coordinate trains.

    Raises:
        ValueError: scores of another size, NaN among them, or all n equal although a choice must be made.

    Warns:
        UserWarning: more than 1 % of the n coordinates tie where the line falls between kept and not kept.

    """
    if scores.shape != (space.size,):
        raise ValueError(f"this space needs scores of shape ({space.size},), not {tuple(scores.shape)}")
    named = space.unflatten(scores.detach())
    parts = {n: t for n, t in named.items() if t.numel() and not matches(n, sparsity.always_train)}
    kept, tied = _keep(parts, sparsity, largest)
    _check_spread(parts.values(), kept.values())
    if tied > TIED_SHARE * (n := sum(part.numel() for part in parts.values())):
        text = f"{tied / n:.1%} of the scores tie at the threshold; among them the lowest indices train"
        warnings.warn(text, stacklevel=2)
    return torch.cat([kept.get(name, torch.ones_like(t, dtype=torch.bool)).reshape(-1) for name, t in named.items()])


def _keep(parts: Mapping[str, Tensor], sparsity: Sparsity, largest: bool) -> tuple[dict[str, Tensor], int]:
    """Choose within every pool of units: the marks of every tensor, flat, and the coordinates that tie."""
    kept: dict[str, Tensor] = {}
    tied = 0
    for pool in _pools(parts, sparsity):
        blocks = [_block([parts[name] for name in group], sparsity.unit) for group in pool]
        mean = torch.cat([block.mean(1) for block in blocks])  # (U,)
        size = torch.cat([mean.new_full((len(block),), block.shape[1], dtype=torch.long) for block in blocks])
        taken = _take(mean, size, sparsity, largest)
        tied += _count_tied(mean, size, taken, largest)
        for group, units in zip(pool, taken.split([len(block) for block in blocks]), strict=True):
            kept |= {name: units.repeat_interleave(parts[name].numel() // len(units)) for name in group}
    return kept, tied


def _pools(parts: Mapping[str, Tensor], sparsity: Sparsity) -> list[list[list[str]]]:
    """List what is counted together: pools of groups of names; a group's tensors share their output units."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, part in parts.items():
        layer, _, leaf = name.rpartition(".")
        shared = sparsity.unit == "output" and leaf in ("weight", "bias")
        groups.setdefault((f"{layer}." if shared else name, part.shape[0] if part.dim() else 1), []).append(name)
    listed = list(groups.values())
    return [[group] for group in listed] if sparsity.scope == "tensor" else [listed] * bool(listed)


def _block(tensors: Sequence[Tensor], unit: str) -> Tensor:
    """Lay out the scores of a group's units, one a line: (U, coordinates of a unit)."""
    if unit == "coordinate":
        return tensors[0].reshape(-1, 1)
    return torch.cat([t.reshape(t.shape[0] if t.dim() else 1, -1) for t in tensors], 1).double()


def _take(mean: Tensor, size: Tensor, sparsity: Sparsity, largest: bool) -> Tensor:
    """Mark units in order of their score while their coordinates fit: (U,), (U,) -> bool (U,)."""
    if sparsity.unit == "coordinate":
        return top_fraction(mean, sparsity.density, largest=largest)
    _check(mean)
    order = mean.argsort(descending=largest, stable=True)
    taken = torch.zeros_like(size, dtype=torch.bool)
    taken[order] = size[order].cumsum(0) <= count(sparsity.density, int(size.sum()))
    return taken


def _count_tied(mean: Tensor, size: Tensor, taken: Tensor, largest: bool) -> int:
    """Count the coordinates whose score stands on both sides of the line; 0 when it falls between two scores."""
    if taken.all() or not taken.any():
        return 0
    edge = mean[taken].min() if largest else mean[taken].max()
    at = mean == edge
    return int(size[at].sum()) if (at & ~taken).any() else 0


def _threshold(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Find the k-th best score of every row: (*, n) -> (*, 1)."""
    best = scores.topk(k, dim=-1, largest=largest, sorted=False).values
    return best.amin(-1, keepdim=True) if largest else best.amax(-1, keepdim=True)


def _check(scores: Tensor) -> None:
    if scores.dim() == 0:
        raise ValueError("scores need at least one dimension")
    if scores.isnan().any():
        raise ValueError("the scores hold NaN, which has no order; look for a loss or a weight that is not finite")


def _check_spread(scores: Collection[Tensor], kept: Collection[Tensor]) -> None:
    """Refuse to choose among equals: the order of the coordinates alone would decide."""
    chosen = any(mark.any() for mark in kept) and not all(mark.all() for mark in kept)
    if chosen and min(s.min() for s in scores) == max(s.max() for s in scores):
        raise ValueError(
            "all scores are equal, so no choice can be made: a head of zeros, for one, makes the Fisher information of "
            "the backbone zero; take head steps first (calibration.head_steps) or use mask_rule=random"
        )
