"""Deviation scores of AutoFLIP: how far clients moved every coordinate, made comparable between tensors.

Internò et al. (arXiv 2405.10271), whose code takes the mean squared deviation from the start and scales it tensor by
tensor.

Shapes: ``K`` clients, ``P`` coordinates of the space, ``n`` of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice
from fedsparse.core.space import ParamSpace
from fedsparse.masks.quantiles import quantile
from fedsparse.masks.topk import check

_CHUNK = 1 << 20  # scores whose ranks are looked up at once


@torch.no_grad()
def deviation(theta: Tensor, anchor: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Take the mean over clients of the squared deviation from the common start, coordinate by coordinate.

    .. math:: s_j = \sum_k w_k (\theta_{kj} - a_j)^2 / \sum_k w_k

    Computed in float64, client by client. A client of weight 0 is left out, so that nothing of it can reach the mean,
    NaN included.

    Args:
        theta: the clients' rows (K, P).
        anchor: the row that all of them started from (P,).
        weight: weights of the clients (K,), such as their examples; equal by default.

    Returns:
        (P,), in the dtype of ``theta``.

    Raises:
        ValueError: other shapes, no clients, a weight that is negative or not finite, or no weight above 0.

    >>> deviation(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]))
    tensor([1., 1.])

    """
    shares = _shares(theta, anchor, weight)
    start = anchor.double()
    total = torch.zeros_like(start)
    for row, share in zip(theta, shares, strict=True):
        if share:
            total.add_((row.double() - start).square_(), alpha=share)
    return total.to(theta.dtype)


def _shares(theta: Tensor, anchor: Tensor, weight: Tensor | None) -> list[float]:
    """Divide the weights by their sum, and refuse what is no mean."""
    if theta.dim() != 2 or anchor.shape != theta.shape[1:]:
        wanted = "rows (K, P) and a start (P,)"
        raise ValueError(f"a deviation needs {wanted}, not {tuple(theta.shape)} and {tuple(anchor.shape)}")
    weights = theta.new_ones(len(theta), dtype=torch.float64) if weight is None else weight.double()
    if weights.shape != theta.shape[:1]:
        raise ValueError(f"a deviation needs one weight for each of {len(theta)} clients, not {tuple(weights.shape)}")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("the weights of clients must be finite and not negative")
    if not weights.any():
        raise ValueError("a deviation needs at least one client whose weight is above 0")
    return [float(share) for share in weights / weights.sum()]


def normalise(scores: Tensor, space: ParamSpace, how: str, compat: str | None = None) -> Tensor:
    """Make scores comparable between tensors: each tensor on its own, in float64.

    ``minmax``: (s - min) / (max - min), in [0, 1]; ``robust``: (s - median) / (q75 - q25) with linearly interpolated
    quantiles; ``rank``: (r - 0.5) / n, in (0, 1), where r counts from 1 and ties share their mean; ``none``: as they
    are. Where max = min or q75 = q25, the divisor is 1, as in scikit-learn's scalers: a constant tensor gives 0, and
    with ``rank`` 0.5.

    Infinite scores have an order but no scale: ``rank`` and ``none`` take them as they are; for ``minmax`` and
    ``robust`` they count as the largest (or smallest) finite score of their tensor, and a tensor without one gives 0.

    Args:
        scores: (P,).
        space: names and shapes of the coordinates.
        how: ``minmax``, ``robust``, ``rank`` or ``none``.
        compat: ``original`` takes the lower of two middle scores for ``robust``'s median, as ``torch.median`` does.

    Returns:
        (P,), a new tensor in the dtype of ``scores``.

    Raises:
        ValueError: scores of another size, NaN among them, or another word.

    >>> space = ParamSpace(["w", "v"], [torch.Size([3]), torch.Size([2])])
    >>> normalise(torch.tensor([1.0, 2.0, 5.0, 7.0, 7.0]), space, "minmax")
    tensor([0.0000, 0.2500, 1.0000, 0.0000, 0.0000])

    """
    check_how(how)
    if scores.shape != (space.size,):
        raise ValueError(f"this space needs scores of shape ({space.size},), not {tuple(scores.shape)}")
    check(scores)
    result = scores.detach().clone()
    method = _robust_lower if (how, compat) == ("robust", "original") else HOW.get(how)
    if method is not None:
        for part in space.unflatten(result).values():
            if part.numel():
                method(part.view(-1))
    return result


def check_how(how: str) -> None:
    """Refuse a word that names no normalisation.

    Raises:
        ValueError: names the choices.

    """
    check_choice("mask_rule.normalise", how, *HOW, "none")


def _minmax(part: Tensor) -> None:
    _bound(part)
    low, high = (float(edge) for edge in part.aminmax())
    _scale(part, low, low, high)


def _robust(part: Tensor) -> None:
    _bound(part)
    low, middle, high = (quantile([part], q) for q in (0.25, 0.5, 0.75))
    _scale(part, middle, low, high)


def _robust_lower(part: Tensor) -> None:
    _bound(part)
    _scale(part, float(part.median()), quantile([part], 0.25), quantile([part], 0.75))


def _rank(part: Tensor) -> None:
    """Put mean ranks into (0, 1): half of how many scores stand below one, and half of how many not above it."""
    ordered = _sorted(part)
    for piece in part.split(_CHUNK):
        found, places = piece.sort()  # neighbours are looked up one after the other: several times faster
        below, upto = (torch.searchsorted(ordered, found, right=right) for right in (False, True))
        piece[places] = ((below + upto).double() / (2 * len(part))).to(piece.dtype)


def _sorted(part: Tensor) -> Tensor:
    """Sort a copy; numpy needs no indices for it, which would take twice the memory of float32 scores."""
    if part.device.type != "cpu" or part.dtype not in (torch.float32, torch.float64):
        return part.sort().values
    copy = part.clone()
    copy.numpy().sort()
    return copy


def _bound(part: Tensor) -> None:
    """Put the extreme finite scores in the place of infinite ones: in place, 0 if no score is finite."""
    if not (finite := part.isfinite()).all():
        known = part[finite]
        low, high = (known.min(), known.max()) if len(known) else (part.new_zeros(()), part.new_zeros(()))
        part.clamp_(low, high)


def _scale(part: Tensor, origin: float, low: float, high: float) -> None:
    """Subtract the origin and divide by high - low, in float64 and piece by piece: no second row is in memory."""
    factor = 1.0 if math.isfinite(high - low) else 0.5  # a difference beyond float64
    width = factor * high - factor * low
    for piece in part.split(_CHUNK):
        piece.copy_((factor * piece.double() - factor * origin) / (width or 1.0))


HOW: dict[str, Callable[[Tensor], None]] = {"minmax": _minmax, "robust": _robust, "rank": _rank}
