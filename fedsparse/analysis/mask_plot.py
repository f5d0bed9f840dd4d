"""Pictures of masks: the density of every tensor, and the overlap of several masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from fedsparse.analysis.style import wrapped
from fedsparse.masks import Mask

Floats = npt.NDArray[np.float64]
Row = dict[int, tuple[int, int]]  # block -> (coordinates that train, coordinates)
Counts = dict[str, Row]  # by kind of tensor

_COLORS = "Blues"
_DENSITY = PowerNorm(0.5, 0, 1)  # a mask of 5 % and one of 20 % differ to the eye, too
_NONE = "0.92"  # no such tensor in this block
_TICK = 28  # letters of a line of a name beside a heat map
_NUMBERED = 16  # up to so many masks, each pair shows its number
_CELL = (0.40, 0.27)  # inches


def mask_figure(mask: Mask, title: str = "") -> Figure:
    """Draw the density of every tensor: kinds of tensor x blocks, and beside it the tensors outside the blocks.

    The block is the first number in a parameter's name. Needs no display and changes no global state of matplotlib.

    Args:
        mask: a mask of any model.
        title: a line above the picture.

    Returns:
        The figure.

    """
    blocks, others = _sort(mask.tensors)
    panels = [panel for panel in (_by_block(blocks), _alone(others)) if panel.rows]
    figure, axes = _canvas(panels, title)
    for one, panel in zip(axes, panels, strict=False):  # a mask without tensors leaves one axes empty
        _draw(one, panel, max(len(panel.rows) for panel in panels))
    scale = figure.colorbar(ScalarMappable(_DENSITY, _COLORS), ax=axes, fraction=0.05, pad=0.02, aspect=18)
    scale.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0", "5", "20", "50", "100"])
    scale.ax.tick_params(labelsize=8)
    scale.set_label("coordinates that train, %", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def overlap_figure(names: Sequence[str], matrix: Tensor | Floats, title: str = "") -> Figure:
    """Draw the overlaps of masks (``fedsparse.masks.overlaps``) as a heat map.

    Args:
        names: of the M masks; long ones are broken into lines.
        matrix: (M, M), values from 0 to 1.
        title: a line above the picture.

    Returns:
        The figure.

    """
    values = np.asarray(matrix, dtype=np.float64)
    names = [wrapped(name, _TICK) for name in names]
    lines = [line for name in names for line in name.split("\n")]
    side = float(np.clip(max(0.55 * len(names), 0.14 * len(lines)), 1.8, 7.0))
    words, above = 0.08 * max(map(len, lines), default=0), 0.4 * bool(title)
    figure = Figure(figsize=(side + words + 1.2, side + 0.7 * words + 0.4 + above), dpi=150, layout="compressed")
    figure.suptitle(wrapped(title, int(figure.get_figwidth() / 0.08)), fontsize=9)
    axes = figure.subplots()
    image = axes.imshow(values, cmap=_COLORS, vmin=0, vmax=1, interpolation="nearest")
    if len(names) <= _NUMBERED:
        _write(axes, values, Normalize(0, 1), "{:.2f}".format)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=8 if len(names) <= _NUMBERED else 5)
    axes.spines[:].set_visible(False)
    scale = figure.colorbar(image, shrink=0.8)
    scale.set_label("trained in both / trained in either", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    return figure


@dataclass(frozen=True)
class Panel:
    """Densities to draw: cells (R, C), NaN where there is no tensor."""

    name: str
    rows: list[str]
    columns: list[str]
    cells: Floats


def _sort(tensors: Mapping[str, Tensor]) -> tuple[Counts, Counts]:
    """Count what trains, by kind and block, and of the tensors that belong to no block."""
    blocks: dict[tuple[str, str], Row] = {}
    others: dict[tuple[str, str], Row] = {}
    for name, tensor in tensors.items():
        prefix, block, leaf = _split(name)
        found = blocks if block >= 0 else others
        found.setdefault((prefix, leaf), {})[block] = (int(tensor.count_nonzero()), tensor.numel())
    several = len({prefix for prefix, _ in blocks}) > 1
    named = {f"{prefix}.*.{leaf}" if several else leaf: counts for (prefix, leaf), counts in blocks.items()}
    return named, {leaf: counts for (_, leaf), counts in others.items()}


def _split(name: str) -> tuple[str, int, str]:
    """Split a name at its first number: prefix, block and the rest; block -1 without a number.

    >>> _split("blocks.3.attn.qkv.weight"), _split("head.bias")
    (('blocks', 3, 'attn.qkv.weight'), ('', -1, 'head.bias'))
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ("", -1, name) if at is None else (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def _by_block(counts: Counts) -> Panel:
    """Lay out kinds x blocks, and a last column over all blocks."""
    blocks = sorted({block for row in counts.values() for block in row})
    cells = [
        [*(_density([row.get(block, (0, 0))]) for block in blocks), _density(row.values())] for row in counts.values()
    ]
    return Panel("block", list(counts), [*map(str, blocks), "all"], np.array(cells))


def _alone(counts: Counts) -> Panel:
    """Lay out the tensors outside the blocks, one a row."""
    return Panel("", list(counts), [""], np.array([[_density(row.values())] for row in counts.values()]))


def _canvas(panels: Sequence[Panel], title: str) -> tuple[Figure, list[Axes]]:
    """Make one axes for each panel, wide enough for its cells and labels, and for the title."""
    cells = [_CELL[0] * max(len(panel.columns), 2) for panel in panels]
    labels = sum(0.085 * max(map(len, panel.rows)) for panel in panels)
    height = 0.9 + _CELL[1] * max((len(panel.rows) for panel in panels), default=1)
    width = max(sum(cells) + labels + 1.2, 0.085 * len(title) + 0.4)
    figure = Figure(figsize=(width, max(height, 2.2)), dpi=150, layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False, width_ratios=cells or [1])
    return figure, list(axes[0])


def _draw(axes: Axes, panel: Panel, height: int) -> None:
    """Draw densities as coloured cells with their percentages, in rows as high as those of the highest panel."""
    colors = colormaps[_COLORS].with_extremes(bad=_NONE)
    cells = np.ma.masked_invalid(panel.cells)
    rows, columns = panel.cells.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    axes.pcolormesh(*edges, cells, cmap=colors, norm=_DENSITY, edgecolors="white", linewidth=0.8)
    _write(axes, panel.cells, _DENSITY, _percent)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_yticks(range(rows), panel.rows, fontsize=8)
    axes.set_xticks(range(columns), panel.columns, fontsize=8)
    axes.set_xlabel(panel.name, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns > 1:
        axes.axvline(columns - 1.5, color="white", linewidth=4)


def _write(axes: Axes, cells: Floats, norm: Normalize, words: Callable[[float], str]) -> None:
    """Write a number into each cell, white on dark ones."""
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            color = "white" if norm(value) > 0.6 else "black"
            axes.text(column, row, words(value), ha="center", va="center", fontsize=7, color=color)


def _density(counts: Iterable[tuple[int, int]]) -> float:
    ones, sizes = map(sum, zip(*counts, strict=True))
    return ones / sizes if sizes else float("nan")


def _percent(density: float) -> str:
    """Write a density in per cent; what is not quite nothing or everything does not look so.

    >>> [_percent(d) for d in (0, 0.001, 0.2, 0.999, 1)]
    ['0', '<1', '20', '>99', '100']
    """
    if 0 < density < 0.01:
        return "<1"
    return ">99" if 0.99 < density < 1 else f"{100 * density:.0f}"
