"""Looks of the pictures: one colour for a rule in all of them, safe for colour-blind eyes; names without markup."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

Line = str | tuple[int, tuple[int, ...]]  # dashes of a line, as matplotlib takes them
Fill = Literal["full", "none", "left", "top", "right", "bottom"]

# Okabe and Ito, "Color Universal Design" (2008); black and grey for the references, without the pale yellow
_COLOURS = {
    "dense": "#000000",
    "head alone": "#7f7f7f",
    "random": "#CC79A7",
    "most_sensitive": "#D55E00",
    "least_sensitive": "#E69F00",
    "highest_magnitude": "#0072B2",
    "lowest_magnitude": "#009E73",
    "talos": "#56B4E9",
    "largest_change": "#D55E00",
    "smallest_change": "#E69F00",
    "largest_final": "#0072B2",
    "smallest_final": "#56B4E9",
    "largest_increase": "#CC79A7",
    "smallest_increase": "#8C564B",
    "randomk": "#009E73",
}
_SPARE = ("#8C564B", "#6A3D9A", "#B8B000", "#17A2A2")  # rules that are not listed above, in the order of their names
# groups of no order, in the order in which they are taken
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", *_SPARE)
_LINES: tuple[Line, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
    (0, (3, 2, 3, 2, 1, 2)),
    (0, (1, 3)),
)
_FILLS: tuple[Fill, ...] = ("full", "none", "left", "top", "right", "bottom")
_MARKERS = "osD^vPX"
_NO_MASK = "no mask"
_LETTER, _MARGIN, _TITLE = 0.08, 0.6, 0.3  # inches: a letter in a legend, what else a name takes, a title's height
_COLUMN = 44  # letters of a legend's column


@dataclass(frozen=True)
class Style:
    """Colour of a rule; the line and the filled part of a marker tell rows of one rule apart."""

    colour: str
    line: Line
    fill: Fill

    @property
    def marker(self) -> dict[str, Any]:
        """How a marker is filled, in matplotlib's keywords; what is not filled is white."""
        face = "white" if self.fill == "none" else self.colour
        whole = "full" if self.fill == "none" else self.fill
        return {"color": self.colour, "mfc": face, "fillstyle": whole, "markerfacecoloralt": "white"}


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Give every row name its style; the part before the first comma is the rule.

    >>> styles(["random", "random, head.init=probe"])["random, head.init=probe"]
    Style(colour='#CC79A7', line='--', fill='none')

    """
    rules = sorted({_rule(name) for name in names} - _COLOURS.keys())
    colours = _COLOURS | {rule: _SPARE[i % len(_SPARE)] for i, rule in enumerate(rules)}
    found: dict[str, Style] = {}
    for name in sorted(set(names)):
        before = sum(style.colour == colours[_rule(name)] for style in found.values())
        found[name] = Style(colours[_rule(name)], _LINES[before % len(_LINES)], _FILLS[before % len(_FILLS)])
    return found


def markers(names: Sequence[str]) -> dict[str, str]:
    """Give every kind of row its marker, those without a mask a star.

    >>> markers(["no mask", "80% frozen", "50% frozen"])
    {'no mask': '*', '50% frozen': 'o', '80% frozen': 's'}
    """
    masked = sorted(set(names) - {_NO_MASK}, key=lambda name: (len(name), name))
    star = {_NO_MASK: "*"} if _NO_MASK in names else {}
    return star | {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(masked)}


def plain(name: str) -> str:
    r"""Write a name so that matplotlib takes no part of it for markup, and has a glyph for all of it.

    >>> plain("a$b$")
    'a\\$b\\$'

    """
    text = name.encode("unicode_escape").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def panels(
    rows: int, columns: int, *, shared: bool = False, size: tuple[float, float] = (3.8, 2.7)
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of equal panels, their size in inches; those of a row may share their vertical axis."""
    width, height = size
    figure = Figure(figsize=(max(5.6, width * columns), height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if shared else False)
    for panel in axes.flat:
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes.tolist()


def title(figure: Figure, text: str) -> None:
    """Put a title above the panels: data, model, sparsity, seeds; the figure grows by it."""
    figure.set_figheight(figure.get_figheight() + _TITLE)
    figure.suptitle(wrapped(plain(text), int(figure.get_figwidth() / _LETTER)), fontsize=10)


def wrapped(text: str, width: int) -> str:
    r"""Break a long text into lines, between words where that is possible.

    >>> wrapped("random, fedadam, server.lr=0.1", 16)
    'random, fedadam,\nserver.lr=0.1'
    """
    return "\n".join(textwrap.wrap(text, max(width, 8), break_on_hyphens=False))


def percent(axes: Axes) -> None:
    """Label the vertical axis in per cent, with no more digits than needed."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put a legend below the panels, in as many columns as its longest name leaves room for; the figure grows by it."""
    _wrap(handles, int((figure.get_figwidth() - _MARGIN) / _LETTER))
    ncols = max(1, min(4, int(figure.get_figwidth() / _width(handles))))
    _below(figure, handles, ncols)


def legend_columns(figure: Figure, groups: Sequence[Sequence[Line2D]]) -> None:
    """Put a legend below the panels, a column for each group of handles; the figure grows by it."""
    rows = max(map(len, groups))
    for group in groups:
        _wrap(group, _COLUMN)
    blanks = [[Line2D([], [], ls="", label=" ") for _ in range(rows - len(group))] for group in groups]
    figure.set_figwidth(max(figure.get_figwidth(), sum(map(_width, groups))))
    _below(figure, [h for pair in zip(groups, blanks, strict=True) for part in pair for h in part], len(groups))


def _wrap(handles: Sequence[Line2D], letters: int) -> None:
    """Break names that are longer than so many letters."""
    for handle in handles:
        handle.set_label(wrapped(str(handle.get_label()), letters))


def _lines(handle: Line2D) -> list[str]:
    return str(handle.get_label()).split("\n")


def _width(handles: Sequence[Line2D]) -> float:
    """Inches of a column of a legend."""
    return _MARGIN + _LETTER * max(len(line) for handle in handles for line in _lines(handle))


def _below(figure: Figure, handles: Sequence[Line2D], ncols: int) -> None:
    rows = -(-len(handles) // ncols)
    lines = sum(max(len(_lines(handle)) for handle in handles[row::rows]) for row in range(rows))
    figure.set_figheight(figure.get_figheight() + 0.19 * lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize="small")


def _rule(name: str) -> str:
    """Take the rule out of a row's name, of a sparse exchange without the fraction.

    >>> _rule("random, prune"), _rule("largest_change 0.1 %, half")
    ('random', 'largest_change')
    """
    return re.sub(r" [\d.]+ %$", "", name.split(",")[0])
