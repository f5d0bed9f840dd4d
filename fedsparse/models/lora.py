"""Low-rank adapters beside a network's linear layers, by PEFT (Hu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn

from fedsparse.core.checks import check_flag, check_number, check_whole
from fedsparse.core.space import Patterns, matches
from fedsparse.models.vision import seeded

USUAL = (("q_proj", "v_proj"), ("query", "value"), ("qkv",))  # attention projections, as models name them


def lora(
    net: nn.Module,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
    head: Patterns = (),
    seed: int = 0,
) -> nn.Module:
    """Put an adapter beside each target: W x becomes W x + scale B A x, with B = 0 at the start.

    The network's own parameters are frozen, but for the head. A layer ``q`` has then the parameters
    ``q.base_layer.weight``, ``q.lora_A.default.weight`` (r, in) and ``q.lora_B.default.weight`` (out, r).

    Args:
        net: the network, which is changed.
        r: rank.
        alpha: the scale is alpha / r.
        dropout: of the adapters' input.
        targets: last parts of the layers' names, such as ``attn.qkv``; None: the first of ``USUAL`` that there is.
        rslora: the scale is alpha / sqrt(r) (Kalajdzievski 2023).
        head: glob patterns of the parameters that train beside the adapters.
        seed: decides A.

    Returns:
        The network.

    Raises:
        ValueError: PEFT is not installed, a target matches no linear layer, or an option is out of range.

    """
    if find_spec("peft") is None:
        raise ValueError("lora needs PEFT: pip install 'fedsparse[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    check_whole("lora.r", r, 1)
    check_whole("lora.alpha", alpha, 1)
    check_number("lora.dropout", dropout, least=0, below=1)
    check_flag("lora.rslora", rslora)
    chosen = targeted(net, targets)
    narrow = min(chosen, key=lambda name: min(chosen[name].weight.shape))
    check_number("lora.r", r, whole=True, least=1, most=min(chosen[narrow].weight.shape))
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(chosen), use_rslora=rslora, bias="none"
    )
    trains = [name for name, parameter in net.named_parameters() if parameter.requires_grad and matches(name, head)]
    adapted: nn.Module = seeded(lambda: inject_adapter_in_model(config, net), seed)
    for name in trains:
        adapted.get_parameter(name).requires_grad_(True)
    for adapter in adapters(adapted).values():
        for factor in (adapter.down, adapter.up):
            wide(adapted.get_parameter(factor))
    return adapted


def wide(parameter: nn.Parameter) -> None:
    """Convert a parameter beside a base of half precision to float32, in which it trains."""
    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


class Adapter(NamedTuple):
    """Names of an adapter's factors, and the scale of their product.

    Attributes:
        down: of A (r, in).
        up: of B (out, r).
        scale: alpha / r.

    """

    down: str
    up: str
    scale: float


def adapters(net: nn.Module) -> dict[str, Adapter]:
    """Find the adapters of a network that ``lora`` has changed, by layer."""
    from peft.tuners.lora import LoraLayer

    return {
        layer: Adapter(
            f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight", float(module.scaling["default"])
        )
        for layer, module in net.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }


def merged(net: nn.Module) -> nn.Module:
    """Add every adapter to the layer beside which it stands: the network without adapters, which is changed."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, layer.base_layer)
    return net


def targeted(net: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    """Find the linear layers whose names end in a target, by name.

    Raises:
        ValueError: a target matches none; lists the last parts of names that there are.

    """
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    found = dict[str, nn.Linear]()
    if targets is None:
        ends_of = {name.rpartition(".")[2] for name in layers}
        targets = next((usual for usual in USUAL if ends_of.issuperset(usual)), USUAL[0])
    for target in targets:
        ends = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
        if not ends:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(f"lora.targets={target} matches no linear layer of the model; it has {known}")
        found |= ends
    if not found:
        raise ValueError(
            "lora.targets is empty; it must be null or a list of ends of layers' names, such as [query,value]"
        )
    return found


class Setting(NamedTuple):
    """How PEFT computes with an adapter.

    Attributes:
        rank: r.
        alpha: the scale is alpha / r, with ``rslora`` alpha / sqrt(r).
        dropout: of the adapter's input.
        rslora: whether the scale is rank-stabilised.

    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool

    def of_rank(self, rank: int) -> Setting:
        """Set a smaller rank, and the alpha that leaves the scale as it is.

        >>> Setting(8, 16, 0.0, False).of_rank(4), Setting(8, 16, 0.0, True).of_rank(2)
        (Setting(rank=4, alpha=8, dropout=0.0, rslora=False), Setting(rank=2, alpha=8, dropout=0.0, rslora=True))
        """
        share = rank / self.rank
        alpha = self.alpha * (math.sqrt(share) if self.rslora else share)
        return self._replace(rank=rank, alpha=int(alpha) if alpha == int(alpha) else alpha)


def settings(net: nn.Module) -> dict[str, Setting]:
    """Read the settings of a network's adapters, by layer, from PEFT's own layers."""
    from peft.tuners.lora import LoraLayer

    found = dict[str, Setting]()
    for layer, module in net.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            drop = module.lora_dropout["default"]
            share = float(drop.p) if isinstance(drop, nn.Dropout) else 0.0  # PEFT puts an identity where it is 0
            rank, alpha = int(module.r["default"]), int(module.lora_alpha["default"])
            found[layer] = Setting(rank, alpha, share, bool(module.use_rslora.get("default", False)))
    return found
