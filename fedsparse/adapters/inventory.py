"""An inventory of what a run keeps of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsparse.adapters.kept import Kept
from fedsparse.core.weights import distinct


def listing(kept: Kept) -> dict[str, Any]:
    """List adapters by layer, departments, clients, rounds that are kept, and sizes in bytes.

    Returns:
        ``layers`` (a row each: layer, in, out, rank, alpha, scale, bytes), ``targets``, ``beside`` (what trains beside
        the adapters), ``local`` (what stays with clients), ``departments`` (by name: clients, and those that keep
        something after the last round), ``rounds``, ``method`` and ``bytes`` (of an adapter, what trains beside it,
        and the base).

    """
    problem, tensors = kept.assembly.problem, kept.assembly.problem.net.state_dict()
    factors = {name for adapter in problem.adapters.values() for name in (adapter.down, adapter.up)}
    rows = [_layer(kept, layer, tensors) for layer in problem.adapters]
    local = [name for name, part in kept.space.unflatten(kept.space.local).items() if bool(part.any())]
    own = {model.client: model.department for model in kept.at().models if model.client is not None}
    beside = [name for name in kept.space.names if name not in factors]
    rest = {name: tensor for name, tensor in tensors.items() if name not in factors}
    return {
        "method": kept.choices.get("method"),
        "targets": sorted({layer.rpartition(".")[2] for layer in problem.adapters}),
        "layers": rows,
        "beside": [kept.base.plain(name) for name in beside],
        "local": local,
        "departments": {
            name: {"clients": kept.members(name), "own": [c for c, department in own.items() if department == name]}
            for name in kept.departments
        },
        "rounds": list(kept.rounds),
        "bytes": {
            "an adapter": sum(row["bytes"] for row in rows),
            "what trains beside it": sum(tensors[name].nbytes for name in beside),
            "the base": sum(tensor.nbytes for tensor in distinct(rest)),
        },
    }


def _layer(kept: Kept, layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe the adapter of a layer."""
    adapter, setting = kept.assembly.problem.adapters[layer], kept.settings[layer]
    down, up = tensors[adapter.down], tensors[adapter.up]
    return {
        "layer": layer,
        "in": down.shape[1],
        "out": up.shape[0],
        "rank": setting.rank,
        "alpha": setting.alpha,
        "scale": adapter.scale,
        "bytes": down.nbytes + up.nbytes,
    }
