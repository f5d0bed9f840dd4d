"""Figures of single models: losses and distances, lines and their barriers, curvature and sharpness.

Shapes: P coordinates, n of them move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fedsparse.data.datasets import Split
from fedsparse.landscape.curvature import lanczos, sketch
from fedsparse.landscape.interpolation import barrier, between
from fedsparse.landscape.options import GLOBAL, title
from fedsparse.landscape.scene import CURVATURE, SHARPNESS, SIGMA, Scene
from fedsparse.landscape.sharpness import mean_rise, pac_bayes, sam, sigma
from fedsparse.landscape.surface import Evaluated, chunk_size, evaluate, joined
from fedsparse.landscape.task import MeanLoss
from fedsparse.models.pathnorm import path_norm

K, STEPS, PRODUCTS, LOCAL_SAMPLES = 5, 40, 30, 256  # of curvature and sharpness
RHO, RADIUS, DRAWS = 0.05, 0.1, 20  # of sharpness
TARGET, NOISES, BISECTIONS = 0.1, 30, 20  # of sigma


def evaluated(scene: Scene, rows: Tensor, split: Split) -> Evaluated:
    """Evaluate models (M, P)."""
    return joined(evaluate(scene.task, rows.split(chunk_size(scene.task)), split))


def of_models(scene: Scene, splits: Mapping[str, Split]) -> dict[str, Any]:
    """Evaluate the models on splits, and measure the distances between them and from the start."""
    rows = {title(model): scene.row(model) for model in scene.options.models}
    stacked, start = torch.stack(list(rows.values())), scene.models.start
    found = {name: evaluated(scene, stacked, split) for name, split in splits.items()}
    models = {
        name: {
            **{s: {"loss": float(f.loss[i]), "accuracy": float(f.accuracy[i])} for s, f in found.items()},
            "from_start": distance(row, start),
        }
        for i, (name, row) in enumerate(rows.items())
    }
    pairs = combinations(rows.items(), 2)
    return {"models": models, "distances": {f"{a} to {b}": distance(one, other) for (a, one), (b, other) in pairs}}


def distance(first: Tensor, second: Tensor) -> float:
    """L2 distance of two rows (P,)."""
    return float(torch.linalg.vector_norm(first.cpu().double() - second.cpu().double()))


def of_lines(scene: Scene, split: Split) -> dict[str, Any]:
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


def of_curvature(scene: Scene, split: Split) -> dict[str, Any]:
    """Measure the Hessian of the training loss at the global row, over what moves."""
    row, generator = scene.row(GLOBAL), scene.generator(CURVATURE)
    loss, together = MeanLoss(scene.task, split, scene.mask).fitted(row)
    size, products, dtype = loss.subspace.size, loss.hessian(row, retain=together), scene.task.like.dtype
    count = min(K, size)
    values, bounds = lanczos(lambda v: products(v.unsqueeze(0))[0], size, count, STEPS, generator, dtype=dtype)
    found = {"mask": scene.options.mask, "samples": len(split.y), "coordinates": size}
    found |= {"eigenvalues": values.tolist(), "bounds": bounds.tolist()}
    return found | sketch(products, size, PRODUCTS, generator, dtype=dtype)._asdict()


def of_sharpness(scene: Scene, split: Split, train: Split) -> dict[str, Any]:
    """Measure the rise of the training loss near the global row, over what moves, and what follows from it.

    Args:
        scene: models and losses.
        split: samples of the training data, for all but the bound.
        train: all of it.

    """
    row = scene.row(GLOBAL)
    loss, _ = MeanLoss(scene.task, split, scene.mask).fitted(row)
    steps = {"sam": sam(loss, row, RHO), "adaptive_sam": sam(loss, row, RHO, adaptive=True)}
    rise, error = mean_rise(
        scene.task, row, split, scene.generator(SHARPNESS), radius=RADIUS, draws=DRAWS, mask=scene.mask
    )
    return {
        "mask": scene.options.mask,
        "samples": len(split.y),
        "rho": RHO,
        **{name: {"rise": step.rise, "first_order": step.first_order} for name, step in steps.items()},
        "mean_rise": {"radius": RADIUS, "rise": rise, "standard_error": error},
        **_of_noise(scene, loss, train),
        "path_norm": _of_paths(scene, split),
    }


def _of_noise(scene: Scene, loss: MeanLoss, train: Split) -> dict[str, Any]:
    """Find the noise that the model bears on the samples of a loss, and bound its error by it."""
    row, generator, subspace = scene.row(GLOBAL), scene.generator(SIGMA), loss.subspace
    here = evaluated(scene, row.unsqueeze(0), loss.split)

    def noisy(noise: Tensor, split: Split) -> Evaluated:
        return evaluated(scene, (row + subspace.spread(noise.to(row))).unsqueeze(0), split)

    rises: dict[str, Callable[[Tensor], float]] = {
        "loss": lambda noise: float(noisy(noise, loss.split).loss - here.loss),
        "accuracy": lambda noise: float(here.accuracy - noisy(noise, loss.split).accuracy),
    }
    of = scene.options.sigma_of
    value = sigma(rises[of], subspace.size, TARGET, NOISES, steps=BISECTIONS, generator=generator)
    noises = (value * torch.randn(subspace.size, generator=generator) for _ in range(NOISES))
    errors = torch.cat([1 - noisy(noise, train).accuracy for noise in noises]).nan_to_num(1.0)  # not finite is wrong
    error, bound = float(errors.mean()), None
    if torch.equal(scene.models.start.to(row)[~subspace.mask], row[~subspace.mask]):  # else the bound is infinite
        apart = distance(row, scene.models.start) ** 2
        bound = pac_bayes(error, apart, value, len(train.y), 2**BISECTIONS)
    return {
        "sigma": {"of": of, "target": TARGET, "value": value},
        "pac_bayes": {"train_error": error, "samples": len(train.y), "bound": bound},
    }


def _of_paths(scene: Scene, split: Split) -> dict[str, Any]:
    """Compute the path norm, or say why there is none."""
    shape = scene.task.inputs(split.x[torch.arange(1)].to(scene.task.device)).shape[1:]
    try:
        return {"value": path_norm(scene.task.load(scene.row(GLOBAL)), shape), "why": None}
    except ValueError as error:
        return {"value": None, "why": str(error)}
