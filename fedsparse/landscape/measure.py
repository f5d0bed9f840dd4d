"""All figures of a landscape: surfaces, lines and their barriers, curvature, sharpness; what is kept is not repeated.

Shapes: A and B points of the axes, M models, P coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.data.datasets import Split
from fedsparse.landscape.curvature import lanczos, sketch
from fedsparse.landscape.directions import Plane
from fedsparse.landscape.interpolation import barrier, between
from fedsparse.landscape.options import GLOBAL, title
from fedsparse.landscape.scene import CURVATURE, SHARPNESS, Scene, data_hash
from fedsparse.landscape.sharpness import mean_rise, sam
from fedsparse.landscape.store import Store, Surface, numbers
from fedsparse.landscape.surface import Evaluated, chunk_size, evaluate, evaluate_plane, joined
from fedsparse.landscape.task import MeanLoss

K, STEPS, PRODUCTS, LOCAL_SAMPLES = 5, 40, 30, 256  # of curvature and sharpness
RHO, RADIUS, DRAWS = 0.05, 0.1, 20  # of sharpness


@dataclass(frozen=True)
class Measured:
    """All that was asked for.

    Attributes:
        surfaces: by data.
        figures: what landscape.json holds.

    """

    surfaces: dict[str, Surface]
    figures: dict[str, Any]


def measure(scene: Scene, store: Store) -> Measured:
    """Compute what is not kept, and write landscape.json.

    Raises:
        ValueError: a client cannot be trained again, or models or directions span no plane.

    """
    options = scene.options
    surfaces, figures = dict[str, Surface](), dict[str, Any]()
    for data in options.data:
        split, name = scene.split(data, options.samples), data.replace(":", "_")
        surfaces[data] = surface_of(scene, store, split, f"surface_{name}")
        figures[f"surface {data}"] = {"key": str(surfaces[data].key), **surfaces[data].figures()}
        if pairs := options.pairs():
            key = scene.key(split, "lines", pairs, options.grid)
            figures[f"lines {data}"] = store.part(f"lines {data}", key, partial(lines, scene, split))
    local = scene.split("train", LOCAL_SAMPLES)
    if options.curvature:
        key = scene.key(local, "curvature", options.mask, options.seed, K, STEPS, PRODUCTS)
        figures["curvature"] = store.part("curvature", key, lambda: curvature(scene, local))
    if options.sharpness:
        key = scene.key(local, "sharpness", options.mask, options.seed, RHO, RADIUS, DRAWS)
        figures["sharpness"] = store.part("sharpness", key, lambda: sharpness(scene, local))
    said = {"round": scene.models.round, "options": dict(vars(options)), **scene.identity}
    return Measured(surfaces, store.write(said | figures))


def surface_of(scene: Scene, store: Store, split: Split, name: str) -> Surface:
    """Take a surface from the store, or evaluate it."""
    options = scene.options
    asked = (options.plane, options.grid, options.range, options.seed, options.mask, list(options.models))
    key = scene.key(split, "surface", *asked, scene.rounds() if options.plane == "pca" else None)

    def compute() -> Surface:
        plane, marked = scene.plane(), scene.marked()
        rows = torch.stack(list(marked.values()))
        coordinates = plane.coordinates(rows)
        a, b = scene.axes(coordinates)
        loss, accuracy = _on_grid(scene, store, plane, (a, b), split, name, key)
        own = evaluated(scene, rows, split)
        return Surface(
            a=numbers(a),
            b=numbers(b),
            loss=numbers(loss),
            accuracy=numbers(accuracy),
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


def _on_grid(
    scene: Scene, store: Store, plane: Plane, axes: tuple[Tensor, Tensor], split: Split, name: str, key: str
) -> Evaluated:
    """Evaluate the points of a grid: (A, B)."""
    first, second = (grid.reshape(-1) for grid in torch.meshgrid(*axes, indexing="ij"))

    def rest(done: int) -> Iterable[Evaluated]:
        return evaluate_plane(scene.task, plane, first[done:], second[done:], split)

    found = store.points(name, key, len(first), rest)
    shape = tuple(map(len, axes))
    return Evaluated(found.loss.view(shape), found.accuracy.view(shape))


def evaluated(scene: Scene, rows: Tensor, split: Split) -> Evaluated:
    """Evaluate models (M, P)."""
    return joined(evaluate(scene.task, rows.split(chunk_size(scene.task)), split))


def lines(scene: Scene, split: Split) -> dict[str, Any]:
    """Evaluate the lines between models, and measure their barriers."""
    at = torch.linspace(0, 1, scene.options.grid, dtype=torch.float64)
    found = dict[str, Any]()
    for start, end in scene.options.pairs():
        values = evaluated(scene, between(scene.row(start), scene.row(end), at), split)
        found[f"{title(start)} to {title(end)}"] = {
            "loss": values.loss.tolist(),
            "accuracy": values.accuracy.tolist(),
            "gaps": values.gaps,
            "loss_barrier": barrier(values.loss, at)._asdict(),
            "accuracy_barrier": barrier(values.accuracy, at, higher_is_better=True)._asdict(),
        }
    return {"at": at.tolist(), "lines": found}


def curvature(scene: Scene, split: Split) -> dict[str, Any]:
    """Measure the Hessian of the training loss at the global row, over what moves."""
    loss, generator = MeanLoss(scene.task, split, scene.mask), scene.generator(CURVATURE)
    size, products = loss.subspace.size, loss.hessian(scene.row(GLOBAL), retain=True)
    count = min(K, size)
    values, bounds = lanczos(lambda vector: products(vector.unsqueeze(0))[0], size, count, STEPS, generator)
    found = {"samples": len(split.y), "coordinates": size, "eigenvalues": values.tolist(), "bounds": bounds.tolist()}
    return found | sketch(products, size, PRODUCTS, generator)._asdict()


def sharpness(scene: Scene, split: Split) -> dict[str, Any]:
    """Measure the rise of the training loss near the global row, over what moves."""
    loss, row = MeanLoss(scene.task, split, scene.mask), scene.row(GLOBAL)
    steps = {"sam": sam(loss, row, RHO), "adaptive_sam": sam(loss, row, RHO, adaptive=True)}
    rise, error = mean_rise(
        scene.task, row, split, scene.generator(SHARPNESS), radius=RADIUS, draws=DRAWS, mask=scene.mask
    )
    return {
        "samples": len(split.y),
        "rho": RHO,
        **{name: {"rise": step.rise, "first_order": step.first_order} for name, step in steps.items()},
        "mean_rise": {"radius": RADIUS, "rise": rise, "standard_error": error},
    }
