"""Copies of a network."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def copied(net: nn.Module) -> nn.Module:
    """Copy a network, also one that keeps tensors which it has computed, as torch's older weight_norm does."""
    kept = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in kept if not value.is_leaf})
