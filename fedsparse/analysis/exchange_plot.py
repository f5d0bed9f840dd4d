"""Pictures of sparse exchanges: accuracy against bytes, a line for each through its fractions; accuracy over rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from fedsparse.analysis.convergence import SPLITS, draw_curves
from fedsparse.analysis.exchange import fraction_of
from fedsparse.analysis.exchange_lines import Line, Place, line_of, lines, places, references, sent_fraction
from fedsparse.analysis.pareto import AXES, interval, point, ticks
from fedsparse.analysis.style import Style, legend_columns, panels, plain, styles, title, wrapped
from fedsparse.analysis.table import Row, seeds

_VARIANTS = (("-", "o", True), ("--", "s", False), (":", "^", True), ("-.", "D", False), ("-", "v", False))
_REFERENCES = "DXPvhdp"  # of masks; dense training is a star
_DENSE, _DARK = "#000000", "#444444"
_PLAIN = "no feedback, float32"
_ACROSS = 0.003  # of the width of a panel, between lines whose points would hide each other
_BESIDE = 26  # letters of a line beside a panel
Looks = Mapping[Line, dict[str, Any]]


def exchange_figure(table: Sequence[Row], key: str) -> Figure:
    """Draw test accuracy against megabytes, one panel for each place.

    Args:
        table: rows with and without a sparse exchange.
        key: ``bytes_up`` or ``bytes_total``.

    """
    parts = places(table)
    looks = _looks(parts)
    marks = _marks([name for shown in parts.values() for name in references(shown)])
    figure, axes = panels(-(-len(parts) // 2), min(2, len(parts)), size=(5.6, 4.2))
    flat = [panel for line in axes for panel in line]
    for panel, (place, shown) in zip(flat, parts.items(), strict=False):
        _draw(panel, shown, key, looks, marks)
        panel.set_title(_title(place), fontsize="medium")
        panel.set(xlabel=f"MB {AXES[key]}", ylabel="test accuracy")
    for panel in flat[len(parts) :]:
        panel.set_visible(False)
    legend_columns(figure, [g for g in (*_handles(looks), [_handle(*mark) for mark in marks.items()]) if g])
    title(figure, f"sparse exchanges, {seeds([row for shown in parts.values() for row in shown])}")
    return figure


def curves_figure(table: Sequence[Row], fraction: float) -> Figure:
    """Draw validation beside test accuracy over rounds, one row for each place.

    Args:
        table: rows with and without a sparse exchange.
        fraction: the sparse exchanges that send this; infinity for those without a fraction.

    """
    found = places(table)
    looks = _looks(found)
    kept = {
        place: [row for row in rows if row.dense or (row.exchange and sent_fraction(row) == fraction)]
        for place, rows in found.items()
    }
    parts = {place: rows for place, rows in kept.items() if any(row.exchange for row in rows)}
    drawn = [row for rows in parts.values() for row in rows]
    figure, axes = panels(len(parts), len(SPLITS), shared=True)
    for line, (place, shown) in zip(axes, parts.items(), strict=True):
        line[0].set_ylabel(f"{wrapped(_title(place), _BESIDE)}\naccuracy")
        for panel, split in zip(line, SPLITS, strict=True):
            draw_curves(panel, shown, split, {row.name: _style(row, looks) for row in shown})
    for panel, split in zip(axes[0], SPLITS, strict=True):
        panel.set_title(split, fontsize="medium")
    for panel in axes[-1]:
        panel.set_xlabel("round")
    dense = [_handle("dense", {"color": _DENSE})] if any(row.dense for row in drawn) else []
    legend_columns(figure, [group for group in (*_handles(looks, markers=False), dense) if group])
    title(figure, f"sparse exchanges, {_sent(drawn)}{seeds(drawn)}")
    return figure


def _sent(drawn: Sequence[Row]) -> str:
    """Say the fraction that is sent, if there is one."""
    sent = next((fraction_of(row.runs[0].summary) for row in drawn if row.exchange), "")
    return f"{sent} sent, " * bool(sent)


def _title(place: Place) -> str:
    return plain(", ".join(filter(None, place)))


def _style(row: Row, looks: Looks) -> Style:
    return (
        Style(looks[line_of(row)]["color"], looks[line_of(row)]["ls"], "full")
        if row.exchange
        else Style(_DENSE, "-", "full")
    )


def _looks(parts: Mapping[Place, Sequence[Row]]) -> Looks:
    """Give a rule its colour, and what else tells lines apart its stroke and marker."""
    found = sorted({line_of(row) for rows in parts.values() for row in rows if row.exchange})
    colours, variants = styles([rule for rule, _ in found]), sorted({rest for _, rest in found}, key=_simple_first)
    looks = {}
    for rule, rest in found:
        colour, (stroke, marker, filled) = colours[rule].colour, _VARIANTS[variants.index(rest) % len(_VARIANTS)]
        looks[rule, rest] = {"color": colour, "ls": stroke, "marker": marker, "mfc": colour if filled else "white"}
    return looks


def _simple_first(rest: str) -> tuple[int, str]:
    return rest.count(","), rest


def _marks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Give every reference its marker, dense training first."""
    listed = sorted(set(names), key=lambda name: (name != "dense", name))
    others = [name for name in listed if name != "dense"]
    look: dict[str, dict[str, Any]] = {
        name: {"color": "#555555", "marker": _REFERENCES[i % len(_REFERENCES)]} for i, name in enumerate(others)
    }
    look |= {"dense": {"color": _DENSE, "marker": "*", "ms": 12}}
    return {name: {"ls": "", "ms": 7} | look[name] for name in listed}


def _draw(axes: Axes, shown: Sequence[Row], key: str, looks: Looks, marks: Mapping[str, dict[str, Any]]) -> None:
    """Draw lines, and references in front of them; a log axis has no place for 0."""
    axes.set_xscale("log")
    shown = [row for row in shown if point(row, key)[0] > 0]
    decades, found = _decades(shown, key), lines(shown)
    for rank, (line, rows) in enumerate(found.items()):
        aside = 10 ** (_ACROSS * decades * (rank - (len(found) - 1) / 2))
        _points(axes, rows, key, aside, ms=4.5, lw=1.3, **looks[line])
    for name, row in references(shown).items():
        _points(axes, [row], key, 1.0, zorder=4, **marks[name])
        if row.dense:
            axes.axhline(point(row, key)[1], color=_DENSE, lw=0.7, alpha=0.5, zorder=1)
    _ticks(axes, decades)


def _ticks(axes: Axes, decades: float) -> None:
    """Label megabytes, the more of them in a decade the narrower the range is."""
    ticks(axes)
    if decades < 1.2:
        narrow, usual = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]), LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0))
        axes.xaxis.set_major_locator(narrow if decades < 0.5 else usual)
        axes.minorticks_off()


def _decades(shown: Sequence[Row], key: str) -> float:
    return float(np.ptp(np.log10([point(row, key)[0] for row in shown]))) if shown else 0.0


def _points(axes: Axes, rows: Sequence[Row], key: str, aside: float, **look: Any) -> None:
    """Draw means and their 95 % intervals."""
    x, y = np.array([point(row, key) for row in rows]).T
    axes.plot(x * aside, y, **look)
    axes.errorbar(
        x * aside,
        y,
        np.hstack([interval(row) for row in rows]),
        ls="",
        color=look["color"],
        lw=0.8,
        alpha=0.6,
        zorder=2,
    )


def _handles(looks: Looks, *, markers: bool = True) -> list[list[Line2D]]:
    """Explain colours, and strokes with their markers."""
    rules = {rule: {"color": look["color"], "lw": 3} for (rule, _), look in looks.items()}
    rests = {
        rest or _PLAIN: look for (_, rest), look in sorted(looks.items(), key=lambda item: _simple_first(item[0][1]))
    }
    marker = {} if markers else {"marker": ""}
    strokes = {rest: look | {"color": _DARK, "mfc": _open(look), "ms": 4.5} | marker for rest, look in rests.items()}
    return [[_handle(name, look) for name, look in group.items()] for group in (rules, strokes)]


def _open(look: Mapping[str, Any]) -> str:
    return "white" if look["mfc"] == "white" else _DARK


def _handle(name: str, look: Mapping[str, Any]) -> Line2D:
    return Line2D([], [], label=plain(name), **look)
