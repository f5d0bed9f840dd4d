"""All floating-point tensors of a network as one message: what a client gets at first contact.

Shapes: P coordinates of the space, M values of all tensors, those outside the space included.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace
from fedsparse.core.weights import distinct
from fedsparse.federation.exchange.wire.message import encode, read


def write_model(net: nn.Module, space: ParamSpace, mask: Tensor | None = None) -> bytes:
    """Write a network's tensors, each once, in their widest dtype.

    Args:
        net: the network.
        space: its federated tensors.
        mask: bool (P,), coordinates that are sent; the others are zero on both sides. None: all are.

    """
    tensors = floating(net)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    values = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    return encode(values, mask=_sent(net, space, mask))


@torch.no_grad()
def read_model(payload: bytes, net: nn.Module, space: ParamSpace, mask: Tensor | None = None) -> None:
    """Read the message into a network, in place; arguments as those of ``write_model``.

    Raises:
        PayloadError: the message is damaged, or another network's.

    """
    tensors = floating(net)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    sizes = [tensor.numel() for tensor in tensors]
    message = read(payload, sum(sizes), mask=_sent(net, space, mask), dtype=dtype)
    for tensor, values in zip(tensors, message.values.split(sizes), strict=True):
        tensor.copy_(values.view(tensor.shape))


def floating(net: nn.Module) -> list[Tensor]:
    """List the floating-point tensors of a network, each once."""
    return [tensor for tensor in distinct(net.state_dict()) if tensor.is_floating_point()]


def _sent(net: nn.Module, space: ParamSpace, mask: Tensor | None) -> Tensor | None:
    """Spread the marks of the space over all values: bool (M,); those outside the space are sent."""
    if mask is None:
        return None
    marks = {tensor.data_ptr(): part for tensor, part in zip(space.tensors(net), _split(mask, space), strict=True)}
    parts = [marks.get(tensor.data_ptr(), torch.ones(tensor.numel(), dtype=torch.bool)) for tensor in floating(net)]
    return torch.cat([part.reshape(-1).cpu() for part in parts])


def _split(mask: Tensor, space: ParamSpace) -> list[Tensor]:
    return list(mask.split(list(space.sizes)))
