"""Lists the keys beside a ``_target_`` that the job reads itself, the only such list.

An option of ``conf/`` has a ``_target_`` and its arguments. In some groups it also has keys that the job reads; these
are not passed to the target, except those of ``SHARED`` that its signature names.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

JOBS: Mapping[str, tuple[str, ...]] = {
    "data": ("batch_size", "augment", "local_test", "stream", "workers", "loss_per"),
    "exchange": ("payload", "attackers", "attack_scale", "feedback", "precision", "filters", "compat"),
    "lora": ("ranks",),
    "model": ("name", "trainable", "head", "local", "cohort", "checkpoint", "image_side"),
    "optimizer": ("clip_norm",),
    "schedule": ("within",),
    "server": ("untouched",),
    "topology": ("global_mix", "cluster_of", "cluster_metric", "cluster_every"),
}
SHARED: Mapping[str, tuple[str, ...]] = {"data": ("stream",), "exchange": ("compat",), "model": ("name", "checkpoint")}


def target_of(group: str, node: DictConfig) -> DictConfig:
    """Copy a group's node with its ``_target_`` and arguments only, resolved."""
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    excluded = set(JOBS[group])
    if shared := excluded & set(SHARED.get(group, ())):
        excluded -= shared & set(parameters(plain.get("_target_")) or {})
    return OmegaConf.create({key: value for key, value in plain.items() if key not in excluded})


def parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """Read the parameters of a target by name; None if it cannot be imported, which instantiation then reports."""
    try:
        return inspect.signature(get_object(target)).parameters
    except Exception:  # importing runs a package's own code
        return None


def required(target: Any) -> set[str]:
    """List the arguments of a target that have no default."""
    named = (parameters(target) or {}).values()
    return {p.name for p in named if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def taken(target: str) -> Mapping[str, Any] | None:
    """Read the argument names of a target; None if it takes any, or cannot be imported."""
    found = parameters(target)
    return None if found is None or any(p.kind is p.VAR_KEYWORD for p in found.values()) else found
