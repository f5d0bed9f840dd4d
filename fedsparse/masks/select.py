"""From scores to a mask: exactly k coordinates, ties to the lowest index.

Shapes: ``P`` coordinates of the space, ``n`` of them counted (not in ``always_train``), ``U`` output units.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace, matches
from fedsparse.masks.attention import mean_by_head, whole_heads
from fedsparse.masks.floors import best_units, mark_at_least
from fedsparse.masks.sparsity import Sparsity
from fedsparse.masks.topk import check, count, mark
from fedsparse.models.attention import Attention

TIED_SHARE = 0.01  # above this share of ties at the threshold, the order of the coordinates decides: worth a warning
TIED = (
    "{:.1%} of the scores tie at the threshold: among these the mask is arbitrary (the lowest indices train); most "
    "ties are scores of 0, of weights that no sample reached: raise calibration.batches or "
    "calibration.rounds, prepare the head (head.init=probe), or choose another sparsity.ratio or mask_rule"
)


def select(scores: Tensor, space: ParamSpace, sparsity: Sparsity, *, largest: bool, power: float = 1.0) -> Tensor:
    """Choose the coordinates that train.

    Those matching ``sparsity.always_train`` train and are not counted. Of the other n, exactly
    floor(density^power * n + 0.5) are kept; with ``scope=tensor`` that formula holds tensor by tensor, and with
    ``scope=shira`` weight by weight of the linear layers, where the density is rank * (in + out) / (in * out). With
    ``unit=output`` whole units are taken in order of their mean score, as a prefix, while they fit into that number; it
    can then come out smaller, and with ``scope=tensor`` it is counted per weight and bias. No tensor falls below
    ``sparsity.min_density``: others pay for it.

    Args:
        scores: (P,), one score for every coordinate.
        space: names and shapes of the coordinates.
        sparsity: how many, and over what.
        largest: whether the largest scores train, or the smallest.
        power: exponent of the density: below 1 on the way to the full sparsity, in several rounds.

    Returns:
        bool (P,), True where a coordinate trains.

    Raises:
        ValueError: scores of another size, NaN among them, all n equal although a choice must be made, a rank that
            asks for more weights than a layer has, or a ``min_density`` that asks for more coordinates than are kept.

    Warns:
        UserWarning: more than 1 % of the n coordinates tie where the line falls between kept and not kept.

    """
    if sparsity.unit == "output" and sparsity.attention:
        plain = replace(sparsity, attention=())
        return select_heads(scores, space, plain, sparsity.attention, largest=largest, power=power)
    if scores.shape != (space.size,):
        raise ValueError(f"this space needs scores of shape ({space.size},), not {tuple(scores.shape)}")
    named = space.unflatten(scores.detach())
    counted = {n: t for n, t in named.items() if t.numel() and not matches(n, sparsity.always_train)}
    parts = linear(counted, sparsity.rank) if sparsity.rank else counted
    kept, tied = _keep(parts, sparsity, largest, power)
    _check_spread(parts.values(), kept.values())
    if tied > TIED_SHARE * (n := sum(part.numel() for part in parts.values())):
        warnings.warn(TIED.format(tied / n), stacklevel=2)
    rest = {n: torch.full_like(t, n not in counted, dtype=torch.bool).reshape(-1) for n, t in named.items()}
    return torch.cat(list((rest | kept).values()))


def select_heads(
    scores: Tensor,
    space: ParamSpace,
    sparsity: Sparsity,
    attentions: Sequence[Attention],
    *,
    largest: bool,
    power: float = 1.0,
) -> Tensor:
    """Choose whole output units as ``select`` does with ``unit=output``, and of attention layers whole heads.

    The head at the line between kept and not kept is dropped if it does not fit whole: at most as many coordinates as
    asked for are kept, at worst one head fewer in each pool. No warning of ties: the units of a head tie by design.

    Args:
        scores: (P,).
        space: names and shapes of the coordinates.
        sparsity: how many; with ``unit=output``.
        attentions: the layers, of ``fedsparse.models.attention.attentions``.
        largest: whether the largest scores train, or the smallest.
        power: exponent of the density.

    Returns:
        bool (P,), True where a coordinate trains.

    Raises:
        ValueError: as ``select``.

    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*scores tie at the threshold.*")
        pooled = mean_by_head(scores, space, attentions, sparsity.always_train)
        mask = select(pooled, space, sparsity, largest=largest, power=power)
    return whole_heads(mask, space, attentions, sparsity.always_train)


def linear(parts: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Pick the weights of linear layers: 2-D tensors called ``weight``.

    Raises:
        ValueError: there is none, or one has fewer than rank * (in + out) weights.

    """
    weights = {n: t for n, t in parts.items() if t.dim() == 2 and n.rpartition(".")[2] == "weight"}
    if not weights:
        raise ValueError("sparsity.scope=shira needs linear layers outside sparsity.always_train; there are none")
    for name, weight in weights.items():
        out, into = weight.shape
        if (wanted := rank * (out + into)) > out * into:
            text = f"sparsity.rank={rank} wants {rank} * ({into} + {out}) = {wanted} weights of {name}"
            largest = out * into // (out + into)
            raise ValueError(f"{text}, which has {out * into}; the largest rank that fits it is {largest}")
    return weights


def _keep(
    parts: Mapping[str, Tensor], sparsity: Sparsity, largest: bool, power: float
) -> tuple[dict[str, Tensor], int]:
    """Choose within every pool: the marks of every tensor, flat, and the coordinates that tie."""
    kept: dict[str, Tensor] = {}
    tied = 0
    choose = _coordinates if sparsity.unit == "coordinate" else _units
    for pool in _pools(parts, sparsity):
        groups = [[parts[name] for name in group] for group in pool]
        n = sum(part.numel() for group in groups for part in group)
        k = count(_density(groups, sparsity) ** power, n)
        marks, ties = choose(groups, k, largest, sparsity.least)
        kept |= dict(zip((name for group in pool for name in group), marks, strict=True))
        tied += ties
    return kept, tied


def _pools(parts: Mapping[str, Tensor], sparsity: Sparsity) -> list[list[list[str]]]:
    """List what is counted together: pools of groups of names; a group's tensors share their output units."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, part in parts.items():
        layer, _, leaf = name.rpartition(".")
        shared = sparsity.unit == "output" and leaf in ("weight", "bias")
        groups.setdefault((f"{layer}." if shared else name, part.shape[0] if part.dim() else 1), []).append(name)
    listed = list(groups.values())
    return [listed] * bool(listed) if sparsity.scope == "global" else [[group] for group in listed]


def _density(groups: Sequence[Sequence[Tensor]], sparsity: Sparsity) -> float:
    """Say which share of a pool trains in the end; with ``scope=shira`` a pool is one weight."""
    if sparsity.rank is None:
        return sparsity.density
    out, into = groups[0][0].shape
    return sparsity.rank * (out + into) / (out * into)


def _coordinates(groups: Sequence[Sequence[Tensor]], k: int, largest: bool, least: float) -> tuple[list[Tensor], int]:
    """Mark the k best coordinates of a pool: flat marks of every tensor, and how many scores tie at the line."""
    parts = [part.reshape(-1) for group in groups for part in group]
    for part in parts:
        check(part)
    return mark_at_least(parts, k, least, largest=largest) if least else mark(parts, k, largest=largest)


def _units(groups: Sequence[Sequence[Tensor]], k: int, largest: bool, least: float) -> tuple[list[Tensor], int]:
    """Mark whole output units in order of their mean score while they fit into k coordinates."""
    blocks = [_block(group) for group in groups]
    means = [block.mean(1) for block in blocks]
    size = torch.cat(
        [
            mean.new_full((len(mean),), block.shape[1], dtype=torch.long)
            for mean, block in zip(means, blocks, strict=True)
        ]
    )  # (U,)
    mean = torch.cat(means)
    check(mean)
    taken = best_units(means, size, k, least, largest=largest)
    order = mean.argsort(descending=largest, stable=True)
    order = order[~taken[order]]  # those that are still to be had
    budget = k - int(size[taken].sum())
    further = size[order].cumsum(0) <= budget
    taken[order] = further
    units = taken.split([len(block) for block in blocks])
    pairs = [(part, chosen) for group, chosen in zip(groups, units, strict=True) for part in group]
    marks = [chosen.repeat_interleave(part.numel() // len(chosen)) for part, chosen in pairs]
    return marks, _tied(mean, size, order, int(further.sum()))


def _block(tensors: Sequence[Tensor]) -> Tensor:
    """Lay out the scores of a group's units, one a line: (U, coordinates of a unit)."""
    return torch.cat([t.reshape(t.shape[0] if t.dim() else 1, -1) for t in tensors], 1).double()


def _tied(mean: Tensor, size: Tensor, order: Tensor, taken: int) -> int:
    """Count the coordinates whose score stands on both sides of the line; 0 when it falls between two scores.

    An infinite score is that of a unit that an earlier round gave up: whoever set it does not train it.
    """
    if taken in (0, len(order)) or mean[order[taken - 1]] != mean[order[taken]] or mean[order[taken]].isinf():
        return 0
    return int(size[mean == mean[order[taken]]].sum())


def _check_spread(scores: Collection[Tensor], kept: Collection[Tensor]) -> None:
    """Refuse to choose among equals: the order of the coordinates alone would decide."""
    chosen = any(mark.any() for mark in kept) and not all(mark.all() for mark in kept)
    if chosen and min(s.min() for s in scores) == max(s.max() for s in scores):
        raise ValueError(
            "all scores are equal, so no choice can be made: a head of zeros, for one, makes the Fisher information of "
            "the backbone zero; take head steps first (calibration.head_steps) or use mask_rule=random"
        )
