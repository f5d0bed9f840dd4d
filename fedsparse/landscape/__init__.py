"""Loss landscapes of models that are rows: planes and lines, curvature, sharpness. It reads models and trains none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = ["Barrier", "Plane", "barrier", "between", "filter_normalise", "random_direction"]

if TYPE_CHECKING:
    from fedsparse.landscape.directions import Plane, filter_normalise, random_direction
    from fedsparse.landscape.interpolation import Barrier, barrier, between
else:  # a barrier needs no curvature
    _HOMES = {
        "Barrier": "fedsparse.landscape.interpolation",
        "Plane": "fedsparse.landscape.directions",
        "barrier": "fedsparse.landscape.interpolation",
        "between": "fedsparse.landscape.interpolation",
        "filter_normalise": "fedsparse.landscape.directions",
        "random_direction": "fedsparse.landscape.directions",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
