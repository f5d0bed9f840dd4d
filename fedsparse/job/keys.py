"""Which keys beside a ``_target_`` are the job's own: here, and nowhere else.

An option of ``conf/`` holds a ``_target_`` and its arguments. Some groups also hold keys that the job reads; the target
does not get these, but for the few of ``SHARED``, which it gets too if its signature names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

JOBS: Mapping[str, tuple[str, ...]] = {
    "data": ("batch_size", "augment", "local_test", "stream", "workers"),
    "exchange": ("payload", "attackers", "attack_scale", "feedback", "precision", "filters", "compat"),
    "model": ("name", "trainable", "head", "local", "cohort"),
    "optimizer": ("clip_norm",),
    "server": ("untouched",),
}
SHARED: Mapping[str, tuple[str, ...]] = {"data": ("stream",), "exchange": ("compat",), "model": ("name",)}


def target_of(group: str, node: DictConfig) -> DictConfig:
    """Keep what is called of a group: its ``_target_`` with the arguments, resolved."""
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    own = set(JOBS[group])
    if shared := own & set(SHARED.get(group, ())):
        own -= shared & set(parameters(plain.get("_target_")) or {})
    return OmegaConf.create({key: value for key, value in plain.items() if key not in own})


def parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """Read the parameters of a target by name; None if it cannot be imported: whoever calls it then says so."""
    try:
        return inspect.signature(get_object(target)).parameters
    except Exception:  # importing runs a package's own code
        return None


def taken(target: str) -> Mapping[str, Any] | None:
    """Give the names that a target takes; None if it takes any, or cannot be had."""
    found = parameters(target)
    return None if found is None or any(p.kind is p.VAR_KEYWORD for p in found.values()) else found
