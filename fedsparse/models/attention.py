"""Attention heads as units: where the rows of one head stand, and a layer with fewer heads.

Shapes: H heads of D dimensions, so H * D rows each of queries, keys and values; P coordinates of a space.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Attention:
    """An attention layer whose heads can be told apart.

    Attributes:
        name: the module's.
        heads: H.
        size: D, dimensions of a head.
        places: layer and first row of its queries, keys and values; timm has them in one layer, BERT in three.
        proj: name of the layer that takes all heads' outputs, head by head.
        counts: attributes of the module that hold H, and H * D.

    """

    name: str
    heads: int
    size: int
    places: tuple[tuple[str, int], tuple[str, int], tuple[str, int]]
    proj: str
    counts: tuple[str, str]

    def rows(self, head: int) -> Iterator[tuple[str, slice]]:
        """Name the output units of one head: layer and rows of its queries, keys and values."""
        for layer, start in self.places:
            yield layer, slice(start + head * self.size, start + (head + 1) * self.size)

    def columns(self, head: int) -> slice:
        """Inputs of ``proj`` that one head fills."""
        return slice(head * self.size, (head + 1) * self.size)


def attentions(net: nn.Module) -> list[Attention]:
    """Find the attention layers that can do with fewer heads: timm's plain one, and BERT's of transformers."""
    return [found for name, module in net.named_modules() if (found := _timm(name, module) or _bert(net, name, module))]


def idle_heads(net: nn.Module, attention: Attention) -> Tensor:
    """Mark the heads that add nothing: values zero with their bias, or columns of ``proj`` zero: bool (H,)."""
    layer, start = attention.places[2]
    values = zero_rows(net.get_submodule(layer))[start : start + attention.heads * attention.size]
    silent = zero_columns(net.get_submodule(attention.proj))
    return values.view(-1, attention.size).all(1) | silent.view(-1, attention.size).all(1)


def keep_heads(net: nn.Module, attention: Attention, kept: Tensor) -> None:
    """Cut the heads that are False in ``kept`` (H,) out of a layer, in place."""
    units = kept.repeat_interleave(attention.size)  # (H * D,)
    one_layer = len({layer for layer, _ in attention.places}) == 1
    for layer in dict.fromkeys(layer for layer, _ in attention.places):
        keep_rows(net.get_submodule(layer), units.repeat(3) if one_layer else units)
    keep_columns(net.get_submodule(attention.proj), units)
    module, heads = net.get_submodule(attention.name), int(kept.sum())
    for attribute, value in zip(attention.counts, (heads, heads * attention.size), strict=True):
        setattr(module, attribute, value)


def zero_rows(layer: nn.Module) -> Tensor:
    """Mark the output units of a layer whose weights and bias are zero: bool (O,)."""
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    zero = (weight == 0).flatten(1).all(1)
    return zero if bias is None else zero & (bias.detach() == 0)


def zero_columns(layer: nn.Module) -> Tensor:
    """Mark the inputs of a layer that it multiplies by zero only: bool (I,)."""
    return (layer.get_parameter("weight").detach() == 0).transpose(0, 1).flatten(1).all(1)


def spare_one(free: Tensor) -> Tensor:
    """Unmark the first of those that may go, if all may: a layer keeps at least one unit. Bool (U,)."""
    first = torch.arange(len(free)) == 0
    return free & ~(first & free.all())


def keep_rows(layer: nn.Module, kept: Tensor) -> None:
    """Leave a linear layer the output units that are True in ``kept`` (O,), in place."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter.detach()[kept].clone()))
    vars(layer)["out_features"] = int(kept.sum())


def keep_columns(layer: nn.Module, kept: Tensor) -> None:
    """Leave a linear layer the inputs that are True in ``kept`` (I,), in place."""
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach()[:, kept].clone())
    vars(layer)["in_features"] = int(kept.sum())


def _timm(name: str, module: nn.Module) -> Attention | None:
    """Read timm's ``Attention``, unless a norm or a gate stands between heads and ``proj``."""
    timm = sys.modules.get("timm.models.vision_transformer")  # while it is not imported, no module is timm's
    if timm is None or not isinstance(module, timm.Attention) or getattr(module, "gate", None) is not None:
        return None
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return None
    heads, size, prefix = int(module.num_heads), int(module.head_dim), f"{name}." if name else ""
    qkv = f"{prefix}qkv"
    places = ((qkv, 0), (qkv, heads * size), (qkv, 2 * heads * size))
    return Attention(name, heads, size, places, f"{prefix}proj", ("num_heads", "attn_dim"))


def _bert(net: nn.Module, name: str, module: nn.Module) -> Attention | None:
    """Read transformers' ``BertSelfAttention``; its output layer stands beside it."""
    if type(module).__name__ != "BertSelfAttention" or not name.endswith(".self"):
        return None
    q, k, v = ((f"{name}.{part}", 0) for part in ("query", "key", "value"))
    proj, counts = f"{name.removesuffix('.self')}.output.dense", ("num_attention_heads", "all_head_size")
    heads, size = (int(vars(module)[key]) for key in (counts[0], "attention_head_size"))
    return Attention(name, heads, size, (q, k, v), proj, counts)
