"""How fast the loss rises around a model, and bounds from it.

Shapes: P coordinates of the space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedsparse.core.checks import check_number, check_positive, check_whole
from fedsparse.data.datasets import Split
from fedsparse.landscape.directions import random_direction
from fedsparse.landscape.surface import POINTS, chunk_size, evaluate, joined
from fedsparse.landscape.task import Task


class Differentiable(Protocol):
    """A loss as a function of the row, such as ``MeanLoss``."""

    def __call__(self, row: Tensor) -> float:
        """Compute the loss at a row (P,)."""

    def gradient(self, row: Tensor) -> Tensor:
        """Compute its gradient (P,), 0 where nothing moves."""


class Rise(NamedTuple):
    """How much the loss rises at the worst point nearby.

    Attributes:
        rise: of the loss.
        first_order: its part by the slope; where training has not ended it is nearly all.

    """

    rise: float
    first_order: float

    @property
    def curvature(self) -> float:
        """What is left of the rise without the slope."""
        return self.rise - self.first_order


def sam(loss: Differentiable, row: Tensor, rho: float = 0.05, adaptive: bool = False) -> Rise:
    """Measure the rise at SAM's ascent step, w + rho g / |g| (Foret et al. 2021, equation 2).

    The adaptive form scales each coordinate by its magnitude, w + rho T^2 g / |T g| with T = |w|, so that rescaled ReLU
    networks are equally sharp (Kwon et al. 2021, equation 6, without the constant that they add to T).

    Args:
        loss: the loss, and its gradient over what moves.
        row: the model (P,).
        rho: length of the step.
        adaptive: which form.

    Raises:
        ValueError: ``rho`` is no positive number.

    """
    check_positive("sharpness.rho", rho)
    gradient = loss.gradient(row).double()
    scale = row.to(gradient).abs() if adaptive else torch.ones_like(gradient)
    norm = float(torch.linalg.vector_norm(scale * gradient))
    if norm == 0:
        return Rise(0.0, 0.0)
    step = scale.square() * gradient * (rho / norm)
    return Rise(loss(row + step.to(row)) - loss(row), rho * norm)


def mean_rise(
    task: Task,
    row: Tensor,
    split: Split,
    generator: torch.Generator,
    *,
    radius: float = 0.1,
    draws: int = 20,
    mask: Tensor | None = None,
    points: int = POINTS,
) -> tuple[float, float]:
    """Measure the mean rise of the loss along random filter-normalised directions, and its standard error.

    Each direction is gone both ways, so that the slope cancels.

    Args:
        task: network and losses.
        row: the model (P,).
        split: the samples.
        generator: draws the directions.
        radius: of the step, as a part of each filter's norm.
        draws: directions, at least 2.
        mask: bool (P,), what moves; by default everything.
        points: of a chunk; see ``chunk_size``.

    Returns:
        Both, NaN where a point's loss is not finite.

    Raises:
        ValueError: no positive radius, fewer than two directions, or a chunk of no point.

    """
    check_positive("sharpness.radius", radius)
    check_whole("sharpness.draws", draws, 2)
    here = float(joined(evaluate(task, [row.unsqueeze(0)], split)).loss)
    drawn = (random_direction(row, task.space, generator, mask) for _ in range(draws))
    steps = (sign * radius * direction for direction in drawn for sign in (1, -1))
    losses = joined(evaluate(task, _chunked(steps, row, chunk_size(task, points)), split)).loss
    rises = losses.view(draws, 2).mean(1) - here
    return float(rises.mean()), float(rises.std() / math.sqrt(draws))


def _chunked(steps: Iterator[Tensor], row: Tensor, size: int) -> Iterator[Tensor]:
    """Stack the points that steps lead to, so many at a time: rows (K, P)."""
    while points := [row + step for step in islice(steps, size)]:
        yield torch.stack(points)


def sigma(
    rise: Callable[[Tensor], float],
    size: int,
    target: float = 0.1,
    draws: int = 30,
    low: float = 1e-3,
    high: float = 0.5,
    steps: int = 20,
    *,
    generator: torch.Generator,
) -> float:
    """Find the standard deviation of normal noise on the weights at which the mean rise is a given one, by bisection.

    Every step draws the same noise, only scaled: so the mean is one function of sigma, and its root does not move.
    (Dziugaite and Roy 2017 perturb by sigma; a square of it in that place, as in Fedland's code, gives the root of the
    result.)

    Args:
        rise: of loss or error at a perturbation (P,) of the weights; not finite counts as above the target.
        size: P.
        target: the mean rise.
        draws: perturbations.
        low: the smallest sigma.
        high: the largest sigma.
        steps: of the bisection.
        generator: draws the noise, on the CPU.

    Returns:
        Sigma; ``low`` if the rise is above the target there already, ``high`` if it is not even there.

    Raises:
        ValueError: a number out of its range.

    """
    check_positive("sigma.target", target)
    check_whole("sigma.draws", draws, 1)
    check_positive("sigma.low", low)
    check_number("sigma.high", high, above=low)
    check_whole("sigma.steps", steps, 1)
    state = generator.get_state()

    def above(scale: float) -> bool:
        generator.set_state(state)
        rises = [float(rise(scale * torch.randn(size, generator=generator))) for _ in range(draws)]
        return not sum(rises) / draws <= target  # NaN is above

    if above(low):
        return low
    if not above(high):
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return (low + high) / 2


def pac_bayes(
    train_error: float, distance2: float, sigma: float, samples: int, grid: int, delta: float = 0.05
) -> float:
    r"""Bound the error of the perturbed model by PAC-Bayes (McAllester; Maurer 2004), the prior at the start.

    .. math:: e + \sqrt{\left(\frac{d^2}{2 \sigma^2} + \ln \frac{2 \sqrt{N} G}{\delta}\right) / 2N}

    Prior and posterior are normal with the same sigma. The prior stands where training began, before the head saw any
    data: else it depends on them. G sigmas are allowed by a union bound.

    Args:
        train_error: e, mean training error of perturbed models, from 0 to 1.
        distance2: squared distance of the model from the start.
        sigma: standard deviation of the perturbations.
        samples: N, of the training data.
        grid: G, sigmas that might have been chosen.
        delta: chance that the bound does not hold.

    Raises:
        ValueError: a number out of its range.

    >>> round(pac_bayes(0.1, 4.0, 0.2, 1000, 20), 6)
    0.273405
    """
    check_number("train_error", train_error, least=0, most=1)
    check_number("distance2", distance2, least=0)
    check_positive("sigma", sigma)
    check_whole("samples", samples, 1)
    check_whole("grid", grid, 1)
    check_number("delta", delta, above=0, below=1)
    complexity = distance2 / (2 * sigma**2) + math.log(2 * math.sqrt(samples) * grid / delta)
    return train_error + math.sqrt(complexity / (2 * samples))
