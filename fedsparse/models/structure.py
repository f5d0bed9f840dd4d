"""A smaller network of the same build: which sizes of which modules differ, and the network made again from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Structure = dict[str, dict[str, int]]  # by module, by attribute

# what layers that can shrink keep beside their tensors
SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_features",
    "groups",
    "num_heads",
    "attn_dim",
    "num_attention_heads",
    "all_head_size",
)


def structure(full: nn.Module, small: nn.Module) -> Structure:
    """List the sizes of a network that differ from those of its full build.

    >>> structure(nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 2)))
    {'0': {'out_features': 2}}
    """
    pairs = zip(full.named_modules(), small.modules(), strict=True)
    found = {name: {a: vars(b)[a] for a in SIZES if vars(a_).get(a) != vars(b).get(a)} for (name, a_), b in pairs}
    return {name: sizes for name, sizes in found.items() if sizes}


def rebuild(net: nn.Module, sizes: Mapping[str, Mapping[str, int]], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a network the sizes of ``structure`` and a state dict of these sizes, in place.

    Raises:
        ValueError: sizes or tensors of another network.

    """
    modules = dict(net.named_modules())
    for name, given in sizes.items():
        if name not in modules or not set(given) <= set(SIZES):
            raise ValueError(f"the exported structure does not fit the network: {name} {dict(given)}")
        for attribute, value in given.items():
            setattr(modules[name], attribute, value)
    for name, tensor in tensors.items():
        _resize(modules.get(name.rpartition(".")[0]), name.rpartition(".")[2], tensor)
    try:
        net.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"the exported tensors do not fit the network: {' '.join(str(error).split())}") from error
    return net


def _resize(module: nn.Module | None, leaf: str, tensor: Tensor) -> None:
    """Make room for a tensor of another shape; what the module lacks is left to ``load_state_dict`` to name."""
    own = getattr(module, leaf, None)
    if module is None or not isinstance(own, Tensor) or own.shape == tensor.shape:
        return
    room = torch.empty(tensor.shape, dtype=own.dtype)
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(room))
    else:
        module.register_buffer(leaf, room)
