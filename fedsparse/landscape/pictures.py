"""Pictures of a landscape: contours, a surface in three dimensions, lines between models."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from fedsparse.analysis.style import legend, panels, percent, plain
from fedsparse.landscape.film import Frame
from fedsparse.landscape.store import Surface

LEVELS = 14
WIDE = 20.0  # highest over lowest loss from which levels are spaced by their logarithm
ON = 1e-3  # of the first axis' length: how far from the plane a model may be for the surface to show its loss
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#000000")
MAP, ROUND = "viridis", (1, 2, 5, 10)


def contour_figure(surface: Surface, title: str, losses: np.ndarray | None = None) -> Figure:
    """Draw the loss as contours, with models and what path leads through them.

    A model off the plane is hollow, and the legend says how far off: the colour under it is not its loss.

    Args:
        surface: to draw.
        title: of the picture.
        losses: that the colours are to range over; by default the surface's own.

    Raises:
        ValueError: no point has a finite loss.

    """
    high = float(np.ptp(surface.b) / np.ptp(surface.a))
    figure = Figure(figsize=(6.2, 1.2 + 4.2 * min(max(high, 0.4), 1.5)), layout="constrained")
    axes = figure.subplots()
    levels, norm = _levels(surface.loss if losses is None else losses)
    loss = np.ma.masked_invalid(surface.loss).T
    filled = axes.contourf(surface.a, surface.b, loss, levels=levels, norm=norm, cmap=MAP)
    axes.contour(surface.a, surface.b, loss, levels=levels, norm=norm, colors="white", linewidths=0.4, alpha=0.6)
    bar = figure.colorbar(filled, ax=axes, label="loss", ticks=levels[::2])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.set_title(plain(title), fontsize="medium")
    shares = [f", {share:.0%} of the variance" for share in surface.shares] or ["", ""]
    axes.set_xlabel(f"first direction{shares[0]}")
    axes.set_ylabel(f"second direction{shares[1]}")
    axes.set_xlim(surface.a[0], surface.a[-1])
    axes.set_ylim(surface.b[0], surface.b[-1])
    axes.set_facecolor("#d9d9d9")  # gaps
    (_path if surface.shares.size else _points)(axes, surface)
    return figure


def animation(frames: Sequence[Frame], data: str) -> bytes:
    """Draw a contour of each round with the same colours: a GIF of two frames a second, the last one longer.

    Raises:
        ValueError: no point has a finite loss.

    """
    losses = np.concatenate([frame.surface.loss.ravel() for frame in frames])
    drawn = list[Image.Image]()
    for frame in frames:
        content = io.BytesIO()
        contour_figure(frame.surface, f"loss, {data}, round {frame.round}", losses).savefig(
            content, format="png", dpi=100
        )
        drawn.append(Image.open(content).convert("RGB"))
    palette = drawn[-1].quantize(256)  # one for all frames: colours do not flicker
    pages = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in drawn]
    whole, times = io.BytesIO(), [*[500] * (len(pages) - 1), 2000]
    pages[0].save(whole, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0, optimize=False)
    return whole.getvalue()


def surface_figure(surface: Surface, title: str) -> Figure:
    """Draw the loss as a surface, on a logarithmic height where its range is wide."""
    figure = Figure(figsize=(6.2, 5.0), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d")
    _, norm = _levels(surface.loss)
    wide = isinstance(norm, LogNorm)
    height = np.log10(surface.loss) if wide else surface.loss
    a, b = np.meshgrid(surface.a, surface.b, indexing="ij")
    colours = colormaps[MAP](norm(np.ma.masked_invalid(surface.loss)))
    axes.plot_surface(a, b, height, facecolors=colours, rcount=60, ccount=60, linewidth=0, shade=False)
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.set_zlabel("loss", labelpad=10)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5, steps=ROUND))
    if wide:
        axes.zaxis.set_major_locator(FixedLocator(np.log10(_ticks(surface.loss)).tolist()))
        axes.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.3g}"))
    axes.set_title(plain(title), fontsize="medium")
    axes.view_init(elev=32, azim=-58)
    axes.set_box_aspect(None, zoom=0.88)  # so that the label of the height is within the picture
    return figure


def lines_figure(found: Mapping[str, Any]) -> Figure:
    """Draw loss and accuracy along the lines between models, a row of panels for each split: data -> figures."""
    figure, axes = panels(len(found), 2)
    handles = dict[str, Line2D]()
    for (data, part), (left, right) in zip(found.items(), axes, strict=True):
        for place, (name, line) in enumerate(part["lines"].items()):
            for panel, key in ((left, "loss"), (right, "accuracy")):
                values = [np.nan if value is None else value for value in line[key]]
                colour = COLOURS[place % len(COLOURS)]
                (handles[name],) = panel.plot(part["at"], values, color=colour, label=plain(name))
        left.set_ylabel(f"loss, {data}")
        right.set_ylabel(f"accuracy, {data}")
        percent(right)
        low, high = right.get_ylim()
        right.set_ylim(low, min(high, 1.02))  # no accuracy lies above
    for panel in axes[-1]:
        panel.set_xlabel("fraction of the way")
    legend(figure, list(handles.values()))
    return figure


def _levels(loss: np.ndarray) -> tuple[np.ndarray, Normalize]:
    """Choose levels of the loss, spaced by their logarithm where the range is wide.

    Raises:
        ValueError: no point has a finite loss.

    """
    present = loss[np.isfinite(loss)]
    if not len(present):
        raise ValueError("no point has a finite loss")
    low, high = float(present.min()), float(present.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    if low > 0 and high / low > WIDE:
        return np.geomspace(low, np.nextafter(high, np.inf), LEVELS), LogNorm(low, high)
    levels = np.asarray(MaxNLocator(LEVELS, steps=ROUND).tick_values(low, high))
    return levels, Normalize(levels[0], levels[-1])


def _ticks(loss: np.ndarray) -> np.ndarray:
    """Choose round numbers within the range of the loss, 1, 2 and 5 of each decade or decades alone."""
    low, high = float(np.nanmin(loss)), float(np.nanmax(loss))
    wanted = (1.0,) if high > 1e4 * low else (1.0, 2.0, 5.0)
    ticks = np.asarray(LogLocator(subs=wanted, numticks=12).tick_values(low, high))
    return ticks[(low <= ticks) & (ticks <= high)]


def _points(axes: Axes, surface: Surface) -> None:
    """Mark models; those on the plane have their name beside them, and all are in the legend."""
    near, handles = ON * float(np.ptp(surface.a)) * float(surface.lengths[0]), list[Line2D]()
    names = zip(surface.models.tolist(), surface.coordinates.tolist(), surface.distance.tolist(), strict=True)
    for place, ((name, at, far), loss) in enumerate(zip(names, surface.own_loss.tolist(), strict=True)):
        colour, off = COLOURS[place % len(COLOURS)], far > near
        face = "none" if off else colour
        said = f"{name}, loss {loss:.3g}" + (f", {far:.3g} off the plane" if off else "")
        (mark,) = axes.plot(*at, "os^Dv"[place % 5], color=colour, markersize=10 if off else 8, label=plain(said))
        mark.set(markerfacecolor=face, markeredgecolor=colour if off else "white", markeredgewidth=1.6)
        mark.set_zorder(3 if off else 4)
        handles.append(mark)
        if not off:
            _named(axes, name, at)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False, fontsize="small")


def _path(axes: Axes, surface: Surface) -> None:
    """Draw a trajectory, its first and last round named."""
    axes.plot(*surface.coordinates.T, color="white", linewidth=2.4)
    axes.plot(*surface.coordinates.T, color=COLOURS[0], linewidth=1.2, marker="o", markersize=4)
    for place in (0, -1):
        _named(axes, str(surface.models[place]), surface.coordinates[place].tolist())
    far = float(surface.distance.max())
    axes.set_title(f"{axes.get_title()}; rounds are up to {far:.2g} off the plane", fontsize="medium")


def _named(axes: Axes, name: str, at: list[float]) -> None:
    """Write a name beside a point, readable on any colour."""
    look: dict[str, Any] = {"fontsize": "small", "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    axes.annotate(plain(name), (at[0], at[1]), (7, 7), textcoords="offset points", zorder=5, **look)
