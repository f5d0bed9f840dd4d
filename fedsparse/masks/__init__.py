"""Masks: which coordinates train. Scores say how much a coordinate matters, selection keeps exactly k of them."""

from __future__ import annotations

from fedsparse.masks.choice import choose
from fedsparse.masks.compare import overlaps
from fedsparse.masks.deviations import deviation, normalise
from fedsparse.masks.evidence import Batches, Evidence, Exploration, Thinning, Updates
from fedsparse.masks.gradual import Gradual
from fedsparse.masks.mask import Mask
from fedsparse.masks.quantiles import above_quantile
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.scores import fisher
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity
from fedsparse.masks.topk import top_fraction

__all__ = [
    "Batches",
    "Evidence",
    "Exploration",
    "Gradual",
    "Mask",
    "MaskRule",
    "Sparsity",
    "Thinning",
    "Updates",
    "above_quantile",
    "choose",
    "deviation",
    "fisher",
    "normalise",
    "overlaps",
    "select",
    "top_fraction",
]
