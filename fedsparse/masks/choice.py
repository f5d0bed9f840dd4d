"""From a rule and its evidence to a mask."""

from __future__ import annotations

import torch

from fedsparse.masks.evidence import Evidence
from fedsparse.masks.mask import Mask
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.select import select


def choose(rule: MaskRule, evidence: Evidence) -> Mask:
    """Choose the coordinates that train: those of best score, as many as the sparsity keeps.

    Raises:
        ValueError: scores that allow no choice (``select``), or evidence that the rule needs and that is missing.

    """
    scores, space, sparsity = rule.scores(evidence), evidence.space, evidence.sparsity
    chosen = scores if scores.dtype == torch.bool else select(scores, space, sparsity, largest=rule.largest)
    return Mask(space.unflatten(chosen), rule.metadata(sparsity))
