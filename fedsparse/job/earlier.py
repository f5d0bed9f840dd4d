"""What a configuration that an earlier version stored means today: names that moved, keys that came since.

It is applied before anything is checked or built, so that an old run folder goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RULES = ("Layers", "Pattern", "RandomK", "Threshold", "TopK")
# by the package of now, and what it has taken over from modules of then
_MOVED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fedsparse.optim": {
        "adam": ("SparseAdam",),
        "fedopt": ("AveragedMomentum", "FedAdagrad", "FedAdam", "FedYogi"),
    },
    "fedsparse.federation.client": {"federation.objective": ("FedProx", "Scaffold")},
    "fedsparse.federation.exchange": {
        "federation.filters": ("feedback", "precision", "sign_flip"),
        "federation.link": ("Link",),
        "federation.rules": _RULES,
        "federation.selection": _RULES,
    },
    "fedsparse.federation.server": {
        "federation.aggregation": ("FedNova", "Robust", "WeightedMean"),
        "federation.robust": ("geometric_median", "krum", "median", "multi_krum", "trimmed_mean"),
        "federation.sampling": ("everyone", "uniform"),
        "federation.topology": ("Flat",),
    },
    "fedsparse.simulation": {
        "federation.artifacts": ("wandb_logger",),
        "federation.client": ("ClientModule",),
        "federation.personal": ("Personal",),
    },
}
# by the name of then, that of now
TARGETS: Mapping[str, str] = {
    **{
        f"fedsparse.{module}.{name}": f"{package}.{name}"
        for package, modules in _MOVED.items()
        for module, names in modules.items()
        for name in names
    },
    **{
        f"fedsparse.federation.exchange.{name}": "fedsparse.federation.exchange.Exchange"
        for name in ("Masked", "Sparse")
    },
    "fedsparse.federation.aggregation.CoordinateMean": "fedsparse.federation.server.WeightedMean",
    **{
        f"fedsparse.federation.{at}.Plain": "fedsparse.federation.client.NoCorrection" for at in ("client", "objective")
    },
}
# by target, the keys that came since, with the value that does what was done then
KEYS: Mapping[str, Mapping[str, Any]] = {"fedsparse.data.partition.classes_per_client": {"even": False}}
# by target and key, what a value of then is called now
VALUES: Mapping[str, Mapping[str, Mapping[Any, Any]]] = {
    "lightning.Trainer": {"precision": {32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}}
}


def renewed(node: Any) -> Any:
    """Write a stored configuration, of nested mappings and lists, in today's names and keys.

    >>> renewed({"_target_": "fedsparse.data.partition.classes_per_client", "nc": 2})["even"]
    False
    """
    if isinstance(node, list):
        return [renewed(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: renewed(value) for key, value in node.items()}
    if isinstance(target := found.get("_target_"), str):
        found["_target_"] = TARGETS.get(target, target)
        found = {**KEYS.get(found["_target_"], {}), **found}
        for key, names in VALUES.get(found["_target_"], {}).items():
            if isinstance(value := found.get(key), int | str):
                found[key] = names.get(value, value)
    return found
