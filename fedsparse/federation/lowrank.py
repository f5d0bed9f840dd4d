"""Weighted means of low-rank updates B A, and how far the product of the means is from the mean of the products.

Shapes: a pair is A (r, in), B (out, r), its scale (LoRA's alpha / r) carried in B; R = sum of the ranks. No (out, in)
matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedsparse.core.checks import check_whole, finite


class Pair(NamedTuple):
    """Factors of a low-rank update.

    Attributes:
        A: (r, in), the down projection.
        B: (out, r), the up projection, with the scale.

    """

    A: Tensor
    B: Tensor


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Stack updates into one whose product is their weighted mean, exactly (FLoRA, Wang et al. 2024).

    Args:
        pairs: K of any ranks.
        weights: K, normalised here.

    Returns:
        A (R, in), B (out, R).

    Raises:
        ValueError: no pairs, other shapes than the first one's, or weights that cannot be normalised.

    """
    shares = _shares(pairs, weights)
    return Pair(
        torch.cat([pair.A for pair in pairs]),
        torch.cat([share * pair.B for share, pair in zip(shares, pairs, strict=True)], dim=1),
    )


def mean(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Average A and B apart (FedIT, Zhang et al. 2024): its product is not the mean of the products.

    Raises:
        ValueError: as ``stack``, or ranks that differ; ``pad`` makes them equal.

    """
    shares = _shares(pairs, weights)
    ranks = sorted({len(pair.A) for pair in pairs})
    if len(ranks) > 1:
        raise ValueError(f"factors of ranks {', '.join(map(str, ranks))} have no mean; pad them to one rank")
    a, b = (
        sum((share * part.double() for share, part in zip(shares, parts, strict=True)), start=torch.zeros(()))
        for parts in zip(*pairs, strict=True)
    )
    return Pair(a.to(pairs[0].A), b.to(pairs[0].B))


def residual(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Factor what the product of the means lacks: mean of the products less product of the means.

    FedEx-LoRA (Singhal et al. 2025) adds it to the base weights. It is the weighted sum of the products of the centred
    factors, so that nothing is subtracted from its like: uncentred in float32 it drowns where clients agree.

    Returns:
        A (R, in), B (out, R), float64.

    Raises:
        ValueError: as ``mean``.

    """
    double = [Pair(pair.A.double(), pair.B.double()) for pair in pairs]
    middle = mean(double, weights)
    return stack([Pair(pair.A - middle.A, pair.B - middle.B) for pair in double], weights)


def error(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[float, float]:
    """Measure the residual: its Frobenius norm, and that as a part of the mean product's norm (0 where that is 0).

    Raises:
        ValueError: as ``mean``.

    """
    absolute, ideal = norm(residual(pairs, weights)), norm(stack(pairs, weights))
    return absolute, absolute / ideal if ideal else 0.0


def norm(pair: Pair) -> float:
    """Frobenius norm of the product, from the r x r Gram matrices of the factors."""
    a, b = pair.A.double(), pair.B.double()
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return max(square, 0.0) ** 0.5  # rounding can leave less than nothing


def truncate(pair: Pair, r: int) -> Pair:
    """Find the nearest product of rank r, the truncated singular value decomposition, by two QR decompositions.

    Args:
        pair: of any rank.
        r: rank of the result, no more than the smallest of the pair's rank, in and out.

    Returns:
        A (r, in), B (out, r), of balanced norms, in the dtype of the pair.

    Raises:
        ValueError: ``r`` is no whole number from 1.

    """
    check_whole("lora.r", r, 1)
    left, core, right = _core(pair)
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    root = values[:r].sqrt()
    return Pair(((root.unsqueeze(1) * v[:r]) @ right.T).to(pair.A), (left @ (u[:, :r] * root)).to(pair.B))


def effective_rank(pair: Pair) -> float:
    """Exponential of the entropy of the product's singular values as shares of their sum (Roy and Vetterli 2007).

    0 for a product that is zero.
    """
    values = torch.linalg.svdvals(_core(pair)[1])
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def pad(pairs: Sequence[Pair], r: int) -> list[Pair]:
    """Pad factors with zeros to rank r; their products stay.

    Raises:
        ValueError: a pair has a higher rank.

    """
    padded = list[Pair]()
    for pair in pairs:
        more = r - len(pair.A)
        if more < 0:
            raise ValueError(f"a pair of rank {len(pair.A)} cannot be padded to rank {r}")
        padded.append(
            Pair(
                *(
                    torch.nn.functional.pad(part, sides)
                    for part, sides in zip(pair, ((0, 0, 0, more), (0, more)), strict=True)
                )
            )
        )
    return padded


def _core(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Write the product as left @ core @ right.T with orthonormal columns left and right, float64."""
    left, upper = torch.linalg.qr(pair.B.double())
    right, lower = torch.linalg.qr(pair.A.double().T)
    return left, upper @ lower.T, right


def _shares(pairs: Sequence[Pair], weights: Sequence[float]) -> list[float]:
    """Check pairs and weights, and normalise the weights.

    Raises:
        ValueError: one line.

    """
    if not pairs:
        raise ValueError("there are no pairs of factors")
    for pair in pairs:
        shapes = pair.A.shape[1:] == pairs[0].A.shape[1:] and pair.B.shape[:1] == pairs[0].B.shape[:1]
        if not shapes or pair.A.dim() != 2 or pair.B.dim() != 2 or len(pair.A) != pair.B.shape[1]:
            shown = f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)}"
            raise ValueError(
                f"a pair has the shapes {shown}; every one must be (r, in) and (out, r), in and out the same"
            )
    total = sum(weights)
    if len(weights) != len(pairs) or not all(finite(w) and w >= 0 for w in weights) or not total > 0:
        raise ValueError(f"weights are {list(weights)}; they must be {len(pairs)} numbers of 0 or more, not all 0")
    return [weight / total for weight in weights]
