"""Forward FLOPs by torch's own counter, and what zeros would save of them.

A multiply-accumulate is two FLOPs; only matrix products, convolutions and attention count
(``torch.utils.flop_counter``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsparse.models.modes import evaluating


def forward_flops(net: nn.Module, x: Tensor) -> int:
    """Count the FLOPs of one forward of inputs x (N, ...), in eval mode.

    >>> forward_flops(nn.Linear(3, 2), torch.zeros(5, 3))  # 5 samples, 3 x 2 multiply-accumulates each
    60
    """
    return _counted(net, x)[""]


def sparse_flops(net: nn.Module, x: Tensor) -> float:
    """Count the FLOPs that would remain if a weight of zero cost nothing: each layer's times its weight's density.

    This is theoretical: torch's dense kernels multiply zeros like any other number. What has no weight (the products of
    attention) counts in full. The weights' zeros are those of a mask where it was pruned.
    """
    flops = _counted(net, x)
    weights = {n: m.weight for n, m in net.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    saved = (flops.get(name, 0) * (1 - density(weight)) for name, weight in weights.items())
    return flops[""] - sum(saved)


def pruning_figures(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Say how small a network is, and would be, after pruning.

    Args:
        net: pruned; zeros stand where a weight was removed.
        x: inputs (N, ...); the FLOPs are those of one of the N.

    Returns:
        ``compression`` (all parameters over those that are not zero; infinite if all are), ``num_nonzero``,
        ``flops`` and ``flops_sparse`` of one sample (``forward_flops``, ``sparse_flops``).

    """
    total, nonzero = count(net)
    figures = {"flops": forward_flops(net, x) / len(x), "flops_sparse": sparse_flops(net, x) / len(x)}
    return {"compression": total / nonzero if nonzero else float("inf"), "num_nonzero": nonzero, **figures}


def count(net: nn.Module) -> tuple[int, int]:
    """Count parameters, and those that are not zero."""
    parameters = list(net.parameters())
    return sum(p.numel() for p in parameters), sum(int(p.detach().count_nonzero()) for p in parameters)


def density(weight: Tensor) -> float:
    """Fraction of a tensor that is not zero; 1 for an empty one."""
    return int(weight.detach().count_nonzero()) / weight.numel() if weight.numel() else 1.0


@torch.no_grad()
def _counted(net: nn.Module, x: Tensor) -> dict[str, int]:
    """Count by module: names as in ``named_modules``, "" for the whole."""
    counter = FlopCounterMode(display=False)
    with evaluating(net), counter:
        net(x.clone())
    totals = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return totals | {"": counter.get_total_flops()}
