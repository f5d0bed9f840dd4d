"""Loss landscapes of a finished run: ``python -m fedsparse.landscape <run folder> grid=25 data=[test,client:0]``.

The folder ``landscape`` in the run folder gets ``landscape.json``, ``surface_<data>.npz`` and the pictures. Keys:
plane=random|models|pca grid range seed models=[global,0,1] round data=[test,train,client:0] mask=all|inside|outside
reference=<run folder> samples curvature sharpness, and trust=[<package>].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.job import trust
from fedsparse.job.command import on_command_line
from fedsparse.job.execute import quiet
from fedsparse.job.prepare import picture
from fedsparse.job.sweep import locked
from fedsparse.landscape.measure import Measured, measure
from fedsparse.landscape.options import Options
from fedsparse.landscape.pictures import contour_figure, lines_figure, surface_figure
from fedsparse.landscape.scene import Scene
from fedsparse.landscape.store import FIGURES, Store
from fedsparse.landscape.table import print_landscape


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
    with locked(folder), made_in(dtype_of(scene.models.assembly.problem.precision)):
        store = Store(folder)
        measured = measure(scene, store)
        pictures = draw(store.folder, measured)
    return measured.figures, [*pictures, store.folder / FIGURES]


def draw(folder: Path, measured: Measured) -> list[Path]:
    """Draw all pictures into a folder; one that cannot be drawn is a warning."""
    found = list[Path]()

    def add(name: str, make: Callable[[], Figure]) -> None:
        (folder / name).unlink(missing_ok=True)  # what shows other figures
        picture(folder / name, make)
        found.extend([folder / name] if (folder / name).is_file() else [])

    for data, surface in measured.surfaces.items():
        name = data.replace(":", "_")
        add(f"contour_{name}.png", partial(contour_figure, surface, f"loss, {data}"))
        add(f"surface_{name}.png", partial(surface_figure, surface, f"loss, {data}"))
    if lines := {name.removeprefix("lines "): part for name, part in measured.figures.items() if "lines " in name}:
        add("lines.png", partial(lines_figure, lines))
    return found


def main() -> None:
    """Entry point of the command line."""

    def body() -> None:
        trusted, typed = trust.split(sys.argv[1:])
        if {"-h", "--help"} & set(typed):
            print(__doc__)
            return
        if not typed:
            raise ValueError("give a run folder, such as: python -m fedsparse.landscape runs/x grid=11")
        quiet()
        print_landscape(*landscape(Path(typed[0]), Options.read(typed[1:]), trusted))

    on_command_line(body)


if __name__ == "__main__":
    main()
