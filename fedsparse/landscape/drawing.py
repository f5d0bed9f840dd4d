"""Draws the landscape of a finished run into its folder: figures, surfaces and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedsparse.core.folder import LANDSCAPE_FIGURES
from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.job.prepare import illustration, picture
from fedsparse.job.resume import stored_choices
from fedsparse.job.sweep import locked
from fedsparse.job.tracked import clients_table, identity_of
from fedsparse.landscape.film import Frame, film
from fedsparse.landscape.measure import Measured, file_name, measure
from fedsparse.landscape.options import Options
from fedsparse.landscape.pictures import animation, contour_figure, lines_figure, surface_figure
from fedsparse.landscape.points import shared
from fedsparse.landscape.scene import Scene
from fedsparse.landscape.store import Store
from fedsparse.simulation.trainer import log_landscape


def landscape(folder: Path, options: Options, trusted: Sequence[str] = ()) -> tuple[dict[str, Any], list[Path]]:
    """Draw the landscape of a finished run into its folder.

    Args:
        folder: the run folder.
        options: what is asked for.
        trusted: names of packages whose code the run may name.

    Returns:
        What ``landscape.json`` holds, and the paths of the pictures and of that file.

    Raises:
        ValueError: the run is not finished, or an option does not go with it.

    """
    scene = Scene.of(folder, options, trusted)
    models, problem = scene.models, scene.models.assembly.problem
    with locked(folder), made_in(dtype_of(problem.precision)), shared(scene, trusted) as points:
        store = Store(folder, None if models.round == models.last else models.round)
        frames = film(scene, store, points) if options.gif else {}
        measured = measure(scene, store, points)
        pictures = draw(store.folder, measured, frames)
    written = [*pictures, store.folder / LANDSCAPE_FIGURES]
    identity, clients = identity_of(folder, *stored_choices(folder)), partial(clients_table, folder, problem)
    log_landscape(models.assembly.session.loggers, folder, identity, written, clients)
    return measured.figures, written


def draw(folder: Path, measured: Measured, frames: Mapping[str, Sequence[Frame]]) -> list[Path]:
    """Draw all pictures into a folder; one that cannot be drawn is a warning."""
    found = list[Path]()

    def add(name: str, make: Callable[[Path], None]) -> None:
        (folder / name).unlink(missing_ok=True)  # what shows other figures
        make(folder / name)
        found.extend([folder / name] if (folder / name).is_file() else [])

    for data, surface in measured.surfaces.items():
        name, title = file_name(data), f"loss, {data}"
        add(f"contour_{name}.png", partial(picture, draw=partial(contour_figure, surface, title)))
        add(f"surface_{name}.png", partial(picture, draw=partial(surface_figure, surface, title)))
    if lines := {name.removeprefix("lines "): part for name, part in measured.figures.items() if "lines " in name}:
        add("lines.png", partial(picture, draw=partial(lines_figure, lines)))
    for data, shots in frames.items():
        add(f"rounds_{file_name(data)}.gif", partial(illustration, content=partial(animation, shots, data)))
    return found
