"""Linear layers that compute the weight gradient of the output units that train, and of no others.

Shapes: b samples (of any leading dimensions), I inputs, O output units, u of them train.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.optim.index import by_units


class _UnitGradient(torch.autograd.Function):
    """A linear map whose backward adds the trained rows of the weight's gradient to ``weight.grad``, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor) -> Tensor:
        """Map x (b, I) by weight (O, I) and bias (O,) to (b, O)."""
        ctx.save_for_backward(x, units)
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        """Gradient of x and bias as usual; that of the weight is added where it is kept, to units (u,) only."""
        (x, units), weight, (grad,) = ctx.saved_tensors, ctx.weight, grads
        flat, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        rows = flat.index_select(1, units).t() @ inputs.to(grad.dtype)
        weight.grad.index_add_(0, units, rows.to(weight.dtype))
        back = grad @ weight.detach().to(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, None, flat.sum(0) if ctx.needs_input_grad[2] else None, None


class _ReturnedUnitGradient(torch.autograd.Function):
    """A linear map whose backward returns the weight's gradient, with zeros in the units that do not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor) -> Tensor:
        """Map x (b, I) by weight (O, I) and bias (O,) to (b, O)."""
        ctx.save_for_backward(x, weight, units)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        """Gradient of x and bias as usual, and that of units (u,) of the weight."""
        (x, weight, units), (grad,) = ctx.saved_tensors, grads
        flat, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        rows = flat.index_select(1, units).t() @ inputs.to(grad.dtype)
        slope = weight.new_zeros(weight.shape).index_copy_(0, units, rows.to(weight.dtype))
        back = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, slope, flat.sum(0) if ctx.needs_input_grad[2] else None, None


class _StackedUnitGradient(torch.autograd.Function):
    """Linear maps of K clients whose backward computes the trained rows of the weights' gradient; the others are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor) -> Tensor:
        """Map x (K, b, I) by weight (K, O, I) and bias (K, O) to (K, b, O)."""
        ctx.save_for_backward(x, weight, units)
        return _mapped(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        """Gradient of x and bias as usual, and that of units (u,) of the weight."""
        (x, weight, units), (grad,) = ctx.saved_tensors, grads
        rows = torch.bmm(grad.index_select(2, units).mT, x.to(grad.dtype))
        slope = weight.new_zeros(weight.shape).index_copy_(1, units, rows.to(weight.dtype))
        back = torch.bmm(grad, weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        return back, slope, grad.sum(1) if ctx.needs_input_grad[2] else None, None


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor | None = None) -> Tensor:
    """Apply the linear maps of K clients: x (K, b, I), weight (K, O, I), bias (K, O) or None -> (K, b, O).

    Args:
        x: inputs.
        weight: of each client.
        bias: of each client.
        units: int64 (u,), the output units whose weight trains; None for all.

    """
    if units is None or not weight.requires_grad or not torch.is_grad_enabled():
        return _mapped(x, weight, bias)
    return _StackedUnitGradient.apply(x, weight, bias, units)


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def trained_units(net: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the linear layers of which whole output units train, and some do not.

    Args:
        net: the network.
        masks: bool (O, I), what trains of a weight, by its name.

    Returns:
        int64 (u,), the units that train, by the weight's name.

    """
    layers = [name for name in linear_layers(net, masks) if not masks[name].all() and by_units(masks[name])]
    return {name: masks[name].flatten(1).any(1).nonzero().squeeze(1) for name in layers}


def _forward(layer: nn.Linear, kind: type[torch.autograd.Function], units: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not layer.weight.requires_grad:
        return F.linear(x, layer.weight, layer.bias)
    mapped: Tensor = kind.apply(x, layer.weight, layer.bias, units)
    return mapped


def linear_layers(net: nn.Module, weights: Iterable[str]) -> dict[str, nn.Linear]:
    """Find the linear layers whose weight has one of these names; a subclass may use its weight otherwise."""
    found = {name: net.get_submodule(name.rpartition(".")[0]) for name in weights if name.endswith(".weight")}
    return {name: layer for name, layer in found.items() if type(layer) is nn.Linear}


def compute_units_only(net: nn.Module, units: Mapping[str, Tensor], returned: bool = False) -> None:
    """Let linear layers compute the weight gradient of some units only.

    Args:
        net: the network; its layers get a ``forward`` of their own until ``compute_all_units``.
        units: int64 (u,), the units that train, by the weight's name.
        returned: whether autograd returns the gradient; else it is added to the weight's ``grad``, which there must be.

    """
    kind = _ReturnedUnitGradient if returned else _UnitGradient
    for name, layer in linear_layers(net, units).items():
        layer.forward = partial(_forward, layer, kind, units[name])  # type: ignore[method-assign]


def compute_all_units(net: nn.Module) -> None:
    """Undo ``compute_units_only``."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.__dict__.pop("forward", None)
