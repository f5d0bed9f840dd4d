"""Masks: which coordinates train. Scores say how much a coordinate matters, selection keeps exactly k of them."""

from __future__ import annotations

from fedsparse.masks.mask import Mask
from fedsparse.masks.rules import MaskRule
from fedsparse.masks.select import Sparsity, select, top_fraction

__all__ = ["Mask", "MaskRule", "Sparsity", "select", "top_fraction"]
