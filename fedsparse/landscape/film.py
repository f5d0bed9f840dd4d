"""The plane of every kept round, on fixed axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fedsparse.core.folder import TRAJECTORY
from fedsparse.landscape.measure import file_name, surface_of
from fedsparse.landscape.points import Points
from fedsparse.landscape.scene import MARGIN, Scene
from fedsparse.landscape.store import Store, Surface

FRAMES = 24  # at most, evenly over the rounds


@dataclass(frozen=True)
class Frame:
    """A surface of one round.

    Attributes:
        round: rounds closed.
        surface: around the models of the round; of principal components always the same.

    """

    round: int
    surface: Surface


def film(scene: Scene, store: Store, points: Points) -> dict[str, list[Frame]]:
    """Evaluate the plane of every kept round up to the one that is drawn, by data.

    Planes through models have the same axes in all rounds, as wide as those of all rounds.

    Args:
        scene: models, data and losses.
        store: of surfaces.
        points: evaluates points of a plane.

    Raises:
        ValueError: fewer than two rounds were kept, or a client cannot be trained again.

    """
    if scene.options.plane == "pca":
        return {data: _growing(scene, store, points, data) for data in scene.options.data}
    scenes = [scene.at(round) for round in _rounds(scene)]
    if scene.options.plane == "models" and scene.options.range is None:
        reach = _reach(scenes)
        scenes = [replace(one, options=replace(one.options, range=reach)) for one in scenes]
    return {
        data: [
            Frame(one.models.round, surface_of(one, store, points, data, f"frame_{file_name(data)}_{one.models.round}"))
            for one in scenes
        ]
        for data in scene.options.data
    }


def _rounds(scene: Scene) -> list[int]:
    """Choose the rounds: where a client is marked, those that it ended with a model.

    Raises:
        ValueError: fewer than two rounds.

    """
    path = scene.models.folder / TRAJECTORY
    kept = sorted({*scene.rounds(), scene.models.round}) if path.is_file() else []
    if any(isinstance(model, int) for model in scene.options.models):
        phases = scene.models.assembly.course.phases
        kept = [closed for closed in kept if closed and not phases.explores(closed - 1)]
    if len(kept) < 2:
        raise ValueError(f"gif=true draws the rounds that trajectory=global keeps, two or more; {path} has {len(kept)}")
    return [kept[place] for place in _evenly(len(kept))]


def _evenly(count: int) -> list[int]:
    """Choose the places of the frames among so many rounds, the first and the last among them.

    >>> _evenly(3), len(_evenly(100))
    ([0, 1, 2], 24)
    """
    places: list[int] = np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int).tolist()
    return places


def _reach(scenes: list[Scene]) -> tuple[float, float]:
    """Ends of both axes, around the models of all rounds."""
    found = torch.cat([one.plane().coordinates(torch.stack(list(one.marked().values()))) for one in scenes])
    low, high = float(found.min()), float(found.max())
    margin = MARGIN * (high - low)
    return low - margin, high + margin


def _growing(scene: Scene, store: Store, points: Points, data: str) -> list[Frame]:
    """Take the plane of a trajectory, with its path up to each round."""
    whole, rounds = surface_of(scene, store, points, data, f"surface_{file_name(data)}"), scene.rounds()
    return [Frame(rounds[last], whole.until(last + 1)) for last in _evenly(len(rounds))]
