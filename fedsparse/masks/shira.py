"""A mask for PEFT's SHiRA tuner, which trains exactly r * (in + out) weights of a linear layer (Bhardwaj et al. 2024).

peft is an optional extra: it is imported only when a mask is handed over.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import ShiraConfig

MaskFunction = Callable[..., Tensor]


def export(tensors: Mapping[str, Tensor], r: int, net: nn.Module | None = None) -> ShiraConfig:
    """Write a mask as a configuration of SHiRA, to be given to ``peft.get_peft_model(net, config)``.

    Linear layers with exactly r * (in + out) ones become SHiRA layers; modules that train entirely (the head) go to
    ``modules_to_save``. With the network at hand each layer gets its mask by name. Without, PEFT is served in the order
    of the tensors, which is the network's in every mask that fedsparse made; a file of others may have another.

    Args:
        tensors: bool tensors by parameter name.
        r: SHiRA's rank.
        net: the network that will be wrapped.

    Returns:
        The configuration, whose ``mask_fn`` gives out the masks.

    Raises:
        ValueError: some linear layer has another number of ones (the line gives the counts), none has this one, or
            something trains that SHiRA cannot train; peft is not installed.

    """
    layers, whole = shira_layers(tensors, r)
    try:
        from peft import ShiraConfig
    except ImportError as error:
        raise ValueError("SHiRA needs peft, which is not installed: pip install peft") from error
    # one pattern of full names: entries of a list would match any layer whose name ends with one of them
    config = ShiraConfig(r=r, target_modules="|".join(map(re.escape, layers)), modules_to_save=whole or None)
    config.mask_fn = _server(layers, net)
    return config


def shira_layers(tensors: Mapping[str, Tensor], r: int) -> tuple[dict[str, Tensor], list[str]]:
    """Sort a mask's modules: masks of the SHiRA layers by name, and names of the modules that train entirely.

    Raises:
        ValueError: the mask is none of SHiRA's, of this rank.

    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    layers = {name: own["weight"] for name, own in modules.items() if _fits(own, r)}
    whole = [name for name, own in modules.items() if name and name not in layers and _all(own)]
    wrong = [name for name, own in modules.items() if name not in layers and name not in whole and not _frozen(own)]
    if wrong or not layers:
        counts = "; ".join(_say(name, modules[name], r) for name in (wrong or list(modules))[:3])
        raise ValueError(f"no SHiRA mask of rank {r} (r * (in + out) ones in each linear layer): {counts}")
    return layers, whole


def _fits(own: Mapping[str, Tensor], r: int) -> bool:
    """Whether a module is a linear layer with exactly r * (in + out) ones in its weight, and none elsewhere."""
    weight = own.get("weight")
    if weight is None or weight.dim() != 2 or int(weight.count_nonzero()) != r * sum(weight.shape):
        return False
    return not any(bool(tensor.any()) for leaf, tensor in own.items() if leaf != "weight")


def _all(own: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.all()) for tensor in own.values())


def _frozen(own: Mapping[str, Tensor]) -> bool:
    """Whether nothing trains, in a module that SHiRA would leave alone: a linear layer needs its ones."""
    linear = own.get("weight") is not None and own["weight"].dim() == 2
    return not linear and not any(bool(tensor.any()) for tensor in own.values())


def _say(name: str, own: Mapping[str, Tensor], r: int) -> str:
    """Count the ones of a module beside what SHiRA needs."""
    counts = {f"{name}.{leaf}".lstrip("."): (int(t.count_nonzero()), t.numel()) for leaf, t in own.items()}
    ones = ", ".join(f"{leaf} has {found} of {size}" for leaf, (found, size) in counts.items())
    weight = own.get("weight")
    needed = r * sum(weight.shape) if weight is not None and weight.dim() == 2 else 0
    return f"{ones}, needed {needed}" + (" in the weight alone" if needed else "")


def _server(layers: Mapping[str, Tensor], net: nn.Module | None) -> MaskFunction:
    """Make the function that PEFT asks for the mask of a layer."""
    names = {id(module): name for name, module in net.named_modules()} if net is not None else None
    order = itertools.cycle(layers)

    def mask(base_layer: nn.Linear, r: int, **options: Any) -> Tensor:
        name = next(order) if names is None else names.get(id(base_layer), "")
        if name not in layers or layers[name].shape != base_layer.weight.shape:
            raise ValueError(f"the mask does not fit the network that PEFT wraps: {name or 'a layer'} differs")
        return layers[name].to(base_layer.weight)

    return mask
