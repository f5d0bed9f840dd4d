"""All that a landscape was asked for: surfaces, and figures of models; what is kept is not computed again.

Shapes: A and B points of the axes, M models, P coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fedsparse.landscape import figures as one
from fedsparse.landscape.grid import Grid
from fedsparse.landscape.points import Points
from fedsparse.landscape.scene import HELD_OUT, Scene, data_hash
from fedsparse.landscape.store import Store, Surface, numbers


@dataclass(frozen=True)
class Measured:
    """All that was asked for.

    Attributes:
        surfaces: by data.
        figures: of them; landscape.json also holds those of earlier calls on the same models.

    """

    surfaces: dict[str, Surface]
    figures: dict[str, Any]


def measure(scene: Scene, store: Store, points: Points) -> Measured:
    """Compute what is not kept, and write landscape.json.

    Args:
        scene: models, data and losses.
        store: of what was computed before.
        points: evaluates points of a plane.

    Raises:
        ValueError: a client cannot be trained again, or models or directions span no plane.

    """
    options = scene.options
    surfaces, figures = dict[str, Surface](), dict[str, Any]()
    train, test = (scene.split(data, options.samples) for data in ("train", "test"))
    key = scene.key(train, "models", scene.named(options.models), data_hash(test))
    figures["models"] = store.part("models", key, lambda: one.of_models(scene, {"train": train, "test": test}))
    for data in options.data:
        split = scene.split(data, options.samples)
        if options.surface:
            surfaces[data] = surface_of(scene, store, points, data, f"surface_{file_name(data)}")
            figures[f"surface {data}"] = {"key": str(surfaces[data].key), **surfaces[data].figures()}
        if pairs := options.pairs():
            key = scene.key(split, "lines", [scene.named(pair) for pair in pairs], options.grid)
            figures[f"lines {data}"] = store.part(f"lines {data}", key, partial(one.of_lines, scene, split))
    local = scene.split("train", one.LOCAL_SAMPLES)
    if options.curvature:
        key = scene.key(local, "curvature", options.mask, options.seed, one.K, one.STEPS, one.PRODUCTS)
        figures["curvature"] = store.part("curvature", key, lambda: one.of_curvature(scene, local))
    if options.sharpness:
        asked = (options.mask, options.seed, options.sigma_of, one.RHO, one.RADIUS, one.DRAWS, data_hash(train))
        key = scene.key(local, "sharpness", *asked)
        figures["sharpness"] = store.part("sharpness", key, lambda: one.of_sharpness(scene, local, train))
    said = {"round": scene.models.round, "options": dict(vars(options)), **scene.identity}
    return Measured(surfaces, store.finish(said, figures))


def file_name(data: str) -> str:
    """Name data in the names of files.

    >>> file_name("client:3")
    'client_3'
    """
    return data.replace(":", "_")


def surface_of(scene: Scene, store: Store, points: Points, data: str, name: str) -> Surface:
    """Take a surface on some data from the store, or evaluate it.

    Args:
        scene: models and losses.
        store: of surfaces.
        points: evaluates points of a plane.
        data: as in the options.
        name: of the surface's file.

    """
    options, split = scene.options, scene.split(data, scene.options.samples)
    asked = (options.plane, options.grid, options.range, options.seed, options.mask, scene.named(options.models))
    finer = options.tolerance if options.refine else None
    key = scene.key(split, "surface", *asked, finer, scene.rounds() if options.plane == "pca" else None)

    def compute() -> Surface:
        plane, marked = scene.plane(), scene.marked()
        rows = torch.stack(list(marked.values()))
        coordinates = plane.coordinates(rows)
        a, b = scene.axes(coordinates)
        grid = Grid(store, name, key, a, b, partial(points, plane, data))
        values = grid.refined(options.tolerance, scene.numpy_generator(HELD_OUT)) if options.refine else grid.whole()
        own = one.evaluated(scene, rows, split)
        return Surface(
            a=numbers(a),
            b=numbers(b),
            loss=values.loss,
            accuracy=values.accuracy,
            errors=values.errors,
            evaluated=np.array(values.evaluated),
            models=np.array(list(marked)),
            coordinates=numbers(coordinates),
            distance=numbers(plane.distance(rows)),
            own_loss=numbers(own.loss),
            own_accuracy=numbers(own.accuracy),
            lengths=numbers(torch.stack([plane.first.norm(), plane.second.norm()])),
            shares=np.array(plane.shares),
            seed=np.array(options.seed),
            data_hash=np.array(data_hash(split)),
            key=np.array(key),
        )

    return store.surface(name, key, compute)
