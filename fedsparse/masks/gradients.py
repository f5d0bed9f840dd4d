"""Gradients of single samples, squared and summed: stacked by ``vmap`` in chunks, or one by one.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch, ``c`` samples of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsparse.core.space import ParamSpace

Forward = Callable[[Tensor], Tensor]
Losses = Callable[[Forward, Tensor, Tensor], Tensor]

_CPU_BYTES = 32 << 20  # a chunk's gradients on a CPU; beyond that they leave the caches, and a plain loop is faster
_CPU_CHUNK = 32
_GPU_COST = 4  # bytes of a sample over bytes of the model: gradient, its float64 square, activations


def add_squares(
    into: Tensor, net: nn.Module, space: ParamSpace, x: Tensor, y: Tensor, *, loss: Losses, chunk: int | None = None
) -> None:
    """Add the squared gradients of single samples, tensor by tensor.

    A model that ``vmap`` cannot run (data-dependent control flow) takes one sample at a time, and a chunk that does not
    fit into a GPU's memory is halved, both to the same result: each try has a copy, as a model may write to its inputs.

    Args:
        into: float64 (P,), added to in place.
        net: the network, in the mode to score; its parameters and their ``.grad`` are not touched.
        space: the coordinates.
        x: inputs (b, ...).
        y: labels (b,).
        loss: ``loss(forward, x, y)`` gives the losses (b,).
        chunk: samples differentiated at once; None chooses (``automatic_chunk``).

    """
    params, totals = own(net, space), list(space.unflatten(into).values())
    size = chunk or automatic_chunk(sum(p.nbytes for p in params.values()), x.device)
    start = 0
    while start < len(x):
        differentiate = stacked_gradients if size > 1 else gradients
        try:
            here = slice(start, start + size)
            found = differentiate(net, params, x[here].clone(), y[here].clone(), loss)
        except RuntimeError as error:
            if size == 1:
                raise
            # out of memory: half of it; else some operation has no batching rule, or a real error comes again
            size = size // 2 if isinstance(error, torch.OutOfMemoryError) else 1
            continue
        for total, gradient in zip(totals, found, strict=True):
            exact = gradient.double()
            total.addcmul_(exact, exact) if size == 1 else total.add_(exact.square().sum(0))
        del found  # not kept beside the next ones
        start += size


def automatic_chunk(model_bytes: int, device: torch.device) -> int:
    """Choose how many samples are differentiated at once.

    On a CPU small models gain from stacking and large ones lose (ViT-S/16 on one core: 1.3 training steps one by one,
    2.7 in chunks of 8). On a GPU as many as its free memory is estimated to hold.

    >>> automatic_chunk(800_000, torch.device("cpu")), automatic_chunk(88_000_000, torch.device("cpu"))
    (32, 1)
    """
    if device.type != "cuda":
        return min(max(_CPU_BYTES // max(1, model_bytes), 1), _CPU_CHUNK)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, (torch.cuda.mem_get_info(device)[0] + cached) // (_GPU_COST * model_bytes))


def own(net: nn.Module, space: ParamSpace) -> dict[str, Tensor]:
    """Take the network's own tensors of a space, detached: no copies."""
    return dict(zip(space.names, (tensor.detach() for tensor in space.tensors(net)), strict=True))


def gradients(net: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Losses) -> Sequence[Tensor]:
    """Differentiate the summed loss of some samples by plain autograd, which any module supports."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    with torch.enable_grad():
        total = loss(_forward(net, leaves), x, y).sum()
    return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)


def stacked_gradients(
    net: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Losses
) -> Sequence[Tensor]:
    """Differentiate every sample's loss at once: (c, *shape) for every tensor."""

    def single(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(_forward(net, params), x.unsqueeze(0), y.unsqueeze(0)).sum()

    # The CPU's fused attention has no batching rule: vmap would run it sample by sample, with a warning.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return list(vmap(grad(single), in_dims=(None, 0, 0))(dict(params), x, y).values())


def _forward(net: nn.Module, params: Mapping[str, Tensor]) -> Forward:
    """Bind the network to parameters; those that are not given stay its own."""
    return lambda x: functional_call(net, dict(params), (x,))
