"""The head in closed form: ridge regression on what the head is given, from sums that clients add up.

Shapes: ``N`` samples, ``D`` features, ``C`` classes. Everything here is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.core.space import Patterns, matches
from fedsparse.models.modes import evaluating


def closed_form(features: Tensor, labels: Tensor, num_classes: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve ridge regression on one-hot labels, with an intercept that is not penalised.

    Args:
        features: (N, D).
        labels: int64 (N,), 0 to C - 1.
        num_classes: C.
        ridge: the penalty on the squared weights, 0 or more; the sum of squared errors is not divided by N.

    Returns:
        Weight (C, D) and bias (C,), float64.

    Raises:
        ValueError: the equations are singular, or a feature is not finite.

    """
    return Statistics.of(features, labels, num_classes).solve(ridge)


def statistics_of(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Statistics:
    """Sum the statistics of batches: features (N, D), labels (N,)."""
    return reduce(add, (Statistics.of(features, labels, num_classes) for features, labels in batches))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one client sends for the closed-form head; the sum over clients is that of their pooled samples.

    Fed3R: Fanì et al., ICML 2024, "Accelerating Heterogeneous Federated Learning with Closed-form Classifiers"; the two
    first sums are added for the intercept. A feature whose mean is a million times its spread or more loses that
    spread to rounding, as in any sum of squares.

    Attributes:
        n: N, samples.
        x: sum of the features (D,).
        y: samples of each class (C,).
        xx: upper triangle of X'X, row by row (D (D + 1) / 2,).
        xy: X'Y, the summed features of each class (D, C).

    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> Statistics:
        """Sum over samples: features (N, D), labels int64 (N,)."""
        x, y = features.double(), F.one_hot(labels, num_classes).double()
        rows, columns = _upper(x.shape[1], x.device)
        return cls(len(x), x.sum(0), y.sum(0), (x.T @ x)[rows, columns], x.T @ y)

    @staticmethod
    def shapes(features: int, classes: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of ``tensors``, for D features and C classes."""
        return (), (features,), (classes,), (features * (features + 1) // 2,), (features, classes)

    @classmethod
    def received(cls, tensors: Sequence[Tensor]) -> Statistics:
        """Build the statistics from ``tensors`` of a client."""
        n, *rest = tensors
        return cls(int(n), *rest)

    def __add__(self, other: Statistics) -> Statistics:
        """Pool two clients."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Statistics(*(mine + theirs for mine, theirs in pairs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What travels, float64."""
        return (self.x.new_tensor(float(self.n)), self.x, self.y, self.xx, self.xy)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Solve the centred normal equations (X'X - n m m' + ridge I) W' = X'Y - m y', m the mean feature.

        Returns:
            Weight (C, D) and bias (C,).

        Raises:
            ValueError: the equations are singular, or a feature is not finite.

        """
        mean, square = self.x / self.n, self._square()
        scale = (square.diagonal() + ridge).sqrt()  # of each feature, so that rounding is the same for all
        scale[scale == 0] = 1
        left = square - self.n * mean.outer(mean)
        left.diagonal().add_(ridge)
        right = self.xy - mean.outer(self.y)
        weight = _solve(left / scale.outer(scale), right / scale[:, None], ridge) / scale[:, None]
        return weight.T.contiguous(), self.y / self.n - mean @ weight

    def _square(self) -> Tensor:
        """Fill X'X (D, D) from its upper triangle."""
        size = len(self.x)
        rows, columns = _upper(size, self.x.device)
        square = self.xx.new_zeros(size, size)
        square[rows, columns] = self.xx
        square[columns, rows] = self.xx
        return square


def head_of(net: nn.Module, patterns: Patterns) -> nn.Linear:
    """Find the one linear layer that the patterns of ``model.head`` name.

    Raises:
        ValueError: they name none, or several.

    """
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    found = [name for name in layers if matches(f"{name}.weight", patterns)]
    if len(found) != 1:
        named = ", ".join(found) or "none"
        raise ValueError(f"model.head={patterns} has to name one linear layer for head.init=closed_form, not {named}")
    return layers[found[0]]


@torch.no_grad()
def features(net: nn.Module, head: nn.Linear, x: Tensor) -> Tensor:
    """Compute what the head is given, in eval mode: inputs (N, ...) -> (N, D), in the net's dtype.

    Raises:
        ValueError: the head is given something else than one vector for each sample.

    """
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with evaluating(net):
            net(x)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape != (len(x), head.in_features):
        shapes = ", ".join(str(tuple(s.shape)) for s in seen) or "nothing"
        raise ValueError(f"head.init=closed_form needs a head that is given one vector a sample; it is given {shapes}")
    return seen[0]


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the T in [0.02, 50] with the smallest cross-entropy of ``logits / T``, on a logarithmic scale.

    The cross-entropy is convex in 1/T, so that there is one minimum (Guo et al. 2017, "On Calibration of Modern Neural
    Networks"). Where every sample is classified rightly it is at the lower end, and training can start from it.

    Args:
        logits: (N, C).
        labels: int64 (N,).

    """
    from scipy.optimize import minimize_scalar  # here, as no other part needs scipy.optimize

    exact = logits.double()

    def loss(log_t: float) -> float:
        return F.cross_entropy(exact * math.exp(-log_t), labels).item()

    widest = math.log(50)
    found = minimize_scalar(loss, bounds=(-widest, widest), method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x)


def _solve(left: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve by Cholesky a system whose diagonal is of the order of 1.

    A pivot near the rounding of the sums is one of a singular matrix that rounding has made regular.
    """
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError("the closed-form head cannot be solved: a feature is not finite, or there are no samples")
    lower, failed = torch.linalg.cholesky_ex(left)
    limit = 100 * len(left) * torch.finfo(left.dtype).eps
    if failed or lower.diagonal().min() ** 2 < limit:
        raise ValueError(f"head.ridge={ridge} leaves the closed-form head's equations singular; it must be larger")
    return torch.cholesky_solve(right, lower)


def _upper(size: int, device: torch.device) -> Tensor:
    return torch.triu_indices(size, size, device=device)
