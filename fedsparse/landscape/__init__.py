"""Loss landscapes of models that are rows: planes and lines, curvature, sharpness. It reads models and trains none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = [
    "Barrier",
    "Evaluated",
    "MeanLoss",
    "Plane",
    "Refined",
    "Rise",
    "Sketch",
    "Task",
    "barrier",
    "between",
    "chunk_size",
    "evaluate",
    "evaluate_plane",
    "evaluate_rows",
    "filter_normalise",
    "frobenius",
    "hutchpp",
    "hvp",
    "joined",
    "lanczos",
    "mean_rise",
    "pac_bayes",
    "path_norm",
    "random_direction",
    "refine",
    "sam",
    "sigma",
    "sketch",
]

if TYPE_CHECKING:
    from fedsparse.landscape.curvature import Sketch, frobenius, hutchpp, hvp, lanczos, sketch
    from fedsparse.landscape.directions import Plane, filter_normalise, random_direction
    from fedsparse.landscape.interpolation import Barrier, barrier, between
    from fedsparse.landscape.refinement import Refined, refine
    from fedsparse.landscape.sharpness import Rise, mean_rise, pac_bayes, sam, sigma
    from fedsparse.landscape.surface import Evaluated, chunk_size, evaluate, evaluate_plane, evaluate_rows, joined
    from fedsparse.landscape.task import MeanLoss, Task
    from fedsparse.models.pathnorm import path_norm
else:  # a barrier needs no curvature
    _HOMES = {
        "Barrier": "fedsparse.landscape.interpolation",
        "Evaluated": "fedsparse.landscape.surface",
        "MeanLoss": "fedsparse.landscape.task",
        "Plane": "fedsparse.landscape.directions",
        "Refined": "fedsparse.landscape.refinement",
        "Rise": "fedsparse.landscape.sharpness",
        "Sketch": "fedsparse.landscape.curvature",
        "Task": "fedsparse.landscape.task",
        "barrier": "fedsparse.landscape.interpolation",
        "between": "fedsparse.landscape.interpolation",
        "chunk_size": "fedsparse.landscape.surface",
        "evaluate": "fedsparse.landscape.surface",
        "evaluate_plane": "fedsparse.landscape.surface",
        "evaluate_rows": "fedsparse.landscape.surface",
        "filter_normalise": "fedsparse.landscape.directions",
        "frobenius": "fedsparse.landscape.curvature",
        "hutchpp": "fedsparse.landscape.curvature",
        "hvp": "fedsparse.landscape.curvature",
        "joined": "fedsparse.landscape.surface",
        "lanczos": "fedsparse.landscape.curvature",
        "mean_rise": "fedsparse.landscape.sharpness",
        "pac_bayes": "fedsparse.landscape.sharpness",
        "path_norm": "fedsparse.models.pathnorm",
        "random_direction": "fedsparse.landscape.directions",
        "refine": "fedsparse.landscape.refinement",
        "sam": "fedsparse.landscape.sharpness",
        "sigma": "fedsparse.landscape.sharpness",
        "sketch": "fedsparse.landscape.curvature",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
