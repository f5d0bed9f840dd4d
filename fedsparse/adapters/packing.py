"""A model as PEFT stores it: ``adapter_config.json``, ``adapter_model.safetensors``, and changes of the base beside it.

PEFT calls a tensor of the base's module ``x`` ``base_model.model.x``; what trains beside the adapters is a module of
``modules_to_save``, whole. What PEFT has no place for goes into ``base_changes.safetensors``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from fedsparse.adapters.base import Base
from fedsparse.core import files
from fedsparse.core.space import ParamSpace
from fedsparse.core.weights import pack
from fedsparse.models.lora import Adapter, Setting

CONFIG, TENSORS, CHANGES = "adapter_config.json", "adapter_model.safetensors", "base_changes.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Parts:
    """A model, divided as PEFT stores it.

    Attributes:
        adapter: factors and saved modules, by PEFT's names.
        saved: modules that are stored whole, as the base's module calls them.
        changes: other tensors that differ from the base as built, by their names in the base's module.

    """

    adapter: Mapping[str, Tensor]
    saved: Sequence[str]
    changes: Mapping[str, Tensor]


def divide(
    net: nn.Module,
    base: Base,
    adapters: Mapping[str, Adapter],
    space: ParamSpace,
    frozen: Collection[str],
    rank: int | None = None,
) -> Parts:
    """Divide a network with a model loaded.

    Args:
        net: the network, with adapters.
        base: it without adapters.
        adapters: by layer.
        space: what trains.
        frozen: names of frozen tensors that are no longer as built.
        rank: of the adapters, where columns of B beyond it are 0; None: the network's.

    """
    tensors, factors = net.state_dict(), dict[str, Tensor]()
    for layer, adapter in adapters.items():
        own = {"lora_A": tensors[adapter.down][:rank], "lora_B": tensors[adapter.up][:, :rank].contiguous()}
        factors |= {f"{PREFIX}{base.within(layer)}.{word}.weight": factor for word, factor in own.items()}
    names = {name for adapter in adapters.values() for name in (adapter.down, adapter.up)}
    beside = [name for name in space.names if name not in names]
    modules = saved_modules(beside, list(adapters))
    inside = {name for name in tensors if any(name.startswith(f"{module}.") for module in modules)}
    saved = {f"{PREFIX}{base.within(name)}": tensors[name] for name in sorted(inside)}
    others = sorted({*beside, *frozen} - inside)
    changes = {base.within(name): tensors[name] for name in others}
    return Parts(factors | saved, [base.within(module) for module in modules], changes)


def saved_modules(names: Sequence[str], layers: Sequence[str]) -> list[str]:
    """List the modules that own these parameters, but those with an adapter inside and those within another.

    >>> saved_modules(["head.fc.weight", "head.fc.bias", "scale", "blocks.0.gain"], ["blocks.0.q"])
    ['head.fc']
    """
    owners = {name.rpartition(".")[0] for name in names} - {""}
    apart = {o for o in owners if not any(f"{layer}.".startswith(f"{o}.") for layer in layers)}
    return sorted(o for o in apart if not any(o.startswith(f"{other}.") for other in apart))


def configuration(net: nn.Module, base: Base, settings: Mapping[str, Setting], saved: Sequence[str]) -> dict[str, Any]:
    """Build what ``adapter_config.json`` holds; a rank or alpha that is not the most common one stands in a pattern."""
    from peft import LoraConfig

    own = {base.within(layer): setting for layer, setting in settings.items()}
    first, rank = next(iter(own.values())), Counter(s.rank for s in own.values()).most_common(1)[0][0]
    alpha = Counter(s.alpha for s in own.values()).most_common(1)[0][0]
    config = LoraConfig(
        task_type=base.task,
        base_model_name_or_path=base.name,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides a float alike
        lora_dropout=first.dropout,
        use_rslora=first.rslora,
        target_modules=targets(net, base, list(settings)),
        modules_to_save=list(saved) or None,
        rank_pattern={layer: s.rank for layer, s in own.items() if s.rank != rank},
        alpha_pattern={layer: s.alpha for layer, s in own.items() if s.alpha != alpha},
        bias="none",
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def targets(net: nn.Module, base: Base, layers: Sequence[str]) -> list[str]:
    """Name the layers by their last parts, as is usual, if these fit no other module; else by their whole names."""
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    fitting = {name for name, _ in net.named_modules() if name.rpartition(".")[2] in ends}
    return ends if fitting == set(layers) else sorted(base.within(layer) for layer in layers)


def write(folder: Path, config: Mapping[str, Any], parts: Parts) -> None:
    """Write a model into a folder, which exists."""
    files.write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    files.write(folder / TENSORS, _safe(parts.adapter))
    if parts.changes:
        files.write(folder / CHANGES, _safe(parts.changes))


def _safe(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors; one with several names is stored under each, since PEFT reads no metadata of other names."""
    whole, names = pack(tensors)
    content: bytes = save(whole | {name: whole[kept].clone() for name, kept in names.items()}, {"format": "pt"})
    return content
