"""Looks of the pictures: one colour for a rule in all of them, safe for colour-blind eyes; names without markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

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
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Style:
    """Colour of a rule; line and filling tell rows of one rule apart."""

    colour: str
    line: str
    filled: bool


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Give every row name its style; the part before the first comma is the rule.

    >>> styles(["random", "random, head.init=probe"])["random, head.init=probe"]
    Style(colour='#CC79A7', line='--', filled=False)

    """
    rules = sorted({_rule(name) for name in names} - _COLOURS.keys())
    colours = _COLOURS | {rule: _SPARE[i % len(_SPARE)] for i, rule in enumerate(rules)}
    found: dict[str, Style] = {}
    for name in sorted(set(names)):
        before = sum(style.colour == colours[_rule(name)] for style in found.values())
        found[name] = Style(colours[_rule(name)], _LINES[before % len(_LINES)], before % 2 == 0)
    return found


def markers(values: Sequence[float]) -> dict[float, str]:
    """Give every sparsity its marker; none is a star."""
    masked = sorted({value for value in values if value})
    return ({0.0: "*"} if 0.0 in values else {}) | {
        value: _MARKERS[i % len(_MARKERS)] for i, value in enumerate(masked)
    }


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


def percent(axes: Axes) -> None:
    """Label the vertical axis in per cent, with no more digits than needed."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put a legend below the panels, in as many columns as its longest name leaves room for; the figure grows by it."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    ncols = max(1, min(4, int(figure.get_figwidth() / (0.6 + 0.08 * longest))))
    _below(figure, handles, ncols)


def legend_columns(figure: Figure, groups: Sequence[Sequence[Line2D]]) -> None:
    """Put a legend below the panels, a column for each group of handles; the figure grows by it."""
    rows = max(map(len, groups))
    blanks = [[Line2D([], [], ls="", label=" ") for _ in range(rows - len(group))] for group in groups]
    longest = [max(len(str(handle.get_label())) for handle in group) for group in groups]
    figure.set_figwidth(max(figure.get_figwidth(), sum(0.6 + 0.08 * letters for letters in longest)))
    _below(figure, [h for pair in zip(groups, blanks, strict=True) for part in pair for h in part], len(groups))


def _below(figure: Figure, handles: Sequence[Line2D], ncols: int) -> None:
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // ncols))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize="small")


def _rule(name: str) -> str:
    return name.split(",")[0]
