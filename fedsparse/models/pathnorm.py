"""The path norm of a network: the root of the summed squares of the products of weights along all paths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedsparse.models.copies import copied

NO_PATHS = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.MultiheadAttention, nn.RNNBase, nn.Softmax)
MAPS = (nn.Linear, _ConvNd)


@torch.no_grad()
def path_norm(net: nn.Module, shape: Sequence[int]) -> float:
    """Compute the path norm of a network of linear maps, ReLU and pooling (Neyshabur et al. 2015).

    All weights and biases are squared, an input of ones goes forward in eval mode, and the root is taken of the summed
    output. BatchNorm, a linear map there, is folded into the layer before it.

    Args:
        net: the network; it stays as it is.
        shape: of one sample, without the batch.

    Returns:
        The norm, computed in float64.

    Raises:
        ValueError: a layer that is no product of weights (LayerNorm, GroupNorm, attention, recurrence), by name; or a
            square that is not finite or is negative, since the activations are no ReLU.

    """
    _refuse_others(net)
    copy = copied(net).double().eval()
    ones = torch.ones(1, *shape, dtype=torch.float64, device=next(copy.parameters()).device)
    before, maps = copy(ones.clone()), _maps_before(copy, ones)
    for module in copy.modules():
        if isinstance(module, _BatchNorm):
            _fold(module, maps.get(module))
    if not torch.allclose(copy(ones.clone()), before, rtol=1e-6):
        raise ValueError("BatchNorm cannot be folded: the layer before it is read elsewhere too")
    for parameter in copy.parameters():
        parameter.square_()
    total = float(copy(ones).sum())
    if not 0 <= total < math.inf:
        raise ValueError(f"the path norm's square is {total:g}: the activations are no ReLU, or the model diverged")
    return math.sqrt(total)


def _refuse_others(net: nn.Module) -> None:
    """Refuse layers that are no sums of products of weights.

    Raises:
        ValueError: one line with the layer's name.

    """
    named = list(net.named_modules())
    wrong = [(n, m) for n, m in named if isinstance(m, NO_PATHS) or "attention" in type(m).__name__.lower()]
    known = (*MAPS, _BatchNorm)
    wrong += [(n, m) for n, m in named if not isinstance(m, known) and list(m.parameters(recurse=False))]
    for name, module in wrong[:1]:
        raise ValueError(f"{name or 'the model'} is {type(module).__name__}, for which there is no path norm")
    for name, module in named:
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(f"{name} has no running statistics, so that it is no linear map")


def _maps_before(net: nn.Module, x: Tensor) -> dict[nn.Module, nn.Module]:
    """Find for each BatchNorm the linear map whose output it takes as it is, from one forward; both run once in it."""
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # holds the tensors: an id is one tensor's while it lives
    found: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, MAPS):
            made[id(output)] = (module, output, output._version)

    def pair(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        source, tensor, version = made.get(id(args[0]), (None, args[0], 0))
        if source is not None and tensor._version == version:  # nothing was written into it since
            found[module] = source

    hooks = [module.register_forward_hook(note) for module in net.modules() if isinstance(module, (*MAPS, _BatchNorm))]
    hooks += [module.register_forward_pre_hook(pair) for module in net.modules() if isinstance(module, _BatchNorm)]
    net(x.clone())
    for hook in hooks:
        hook.remove()
    return {norm: source for norm, source in found.items() if calls[norm] == calls[source] == 1}


def _fold(norm: _BatchNorm, source: nn.Module | None) -> None:
    """Make BatchNorm scale and shift alone, and move the bias of the map before it into its shift.

    The scale may stay apart: the square of a product of weights is that of the factors. That of a sum is not.
    """
    assert norm.running_mean is not None  # refused before
    assert norm.running_var is not None
    ones = torch.ones_like(norm.running_var)
    scale = (ones if norm.weight is None else norm.weight) * torch.rsqrt(norm.running_var + norm.eps)
    shift = (0 * ones if norm.bias is None else norm.bias) - norm.running_mean * scale
    if source is not None and isinstance(source.bias, Tensor):
        shift = shift + scale * source.bias
        source.bias.zero_()
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
    norm.running_mean, norm.running_var, norm.eps = 0 * ones, ones, 0.0
