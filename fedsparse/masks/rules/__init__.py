"""The mask rules of ``conf/mask_rule``, one file each: each scores every coordinate, and the best scores train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = [
    "AutoFLIP",
    "Dense",
    "Fisher",
    "FromFile",
    "Magnitude",
    "MaskRule",
    "Movement",
    "Random",
    "Snip",
    "SynFlow",
    "Talos",
    "talos",
]

if TYPE_CHECKING:
    from fedsparse.masks.rule import MaskRule
    from fedsparse.masks.rules.autoflip import AutoFLIP
    from fedsparse.masks.rules.dense import Dense
    from fedsparse.masks.rules.fisher import Fisher
    from fedsparse.masks.rules.from_file import FromFile
    from fedsparse.masks.rules.magnitude import Magnitude
    from fedsparse.masks.rules.movement import Movement
    from fedsparse.masks.rules.random import Random
    from fedsparse.masks.rules.snip import Snip
    from fedsparse.masks.rules.synflow import SynFlow
    from fedsparse.masks.rules.task_localized import Talos, talos
else:  # whoever uses one rule does not import the others
    _HOMES = {
        "AutoFLIP": "fedsparse.masks.rules.autoflip",
        "Dense": "fedsparse.masks.rules.dense",
        "Fisher": "fedsparse.masks.rules.fisher",
        "FromFile": "fedsparse.masks.rules.from_file",
        "Magnitude": "fedsparse.masks.rules.magnitude",
        "MaskRule": "fedsparse.masks.rule",
        "Movement": "fedsparse.masks.rules.movement",
        "Random": "fedsparse.masks.rules.random",
        "Snip": "fedsparse.masks.rules.snip",
        "SynFlow": "fedsparse.masks.rules.synflow",
        "Talos": "fedsparse.masks.rules.task_localized",
        "talos": "fedsparse.masks.rules.task_localized",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
