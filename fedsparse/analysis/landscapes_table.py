"""Loss landscapes in a report: figures of the last round by setting, differences between partitions, pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from fedsparse.analysis.folders import Problem, Run
from fedsparse.analysis.landscapes import (
    ACCURACY,
    BARRIER,
    DISTANCE,
    FIGURES,
    FIRST,
    LOSS,
    REST,
    RISE,
    Setting,
    barrier_name,
    read,
    settings,
    task,
)
from fedsparse.analysis.landscapes_plot import rounds_figure, several_rounds
from fedsparse.analysis.landscapes_reading import sections as reading
from fedsparse.analysis.page import Picture, Section, Table, slug
from fedsparse.analysis.statistics import Interval, paired
from fedsparse.analysis.table import Row
from fedsparse.analysis.tables import mark, rule_head, share
from fedsparse.core.folder import LANDSCAPE

_MODEL = (LOSS, ACCURACY, "lambda_1", "trace", "Frobenius norm", "path norm", DISTANCE)
_SHARPNESS = (RISE, FIRST, REST, "mean rise", "sigma", "PAC-Bayes bound")
_DIGITS, _MOST = 3, 6  # of a figure, and of those behind the point
_PICTURE = re.compile(r"(contour|surface)_(test|train|client_\d{1,9})\.png|lines\.png")
_UNLIKE = ("partition", "experiment", "trajectory")  # keys that settings of a pair may differ in
_TASK = ("data", "model", "mask_rule", "sparsity")  # keys that one client alone shares with a federation
_BATCH = "data.batch_size"
_TEXT = (
    "The global model after the last round, from the runs' landscape.json: mean over seeds ± half the 95 % interval, "
    "of the runs in the tables above. Training loss is over all samples that clients hold; lambda_1 (the Hessian's "
    "eigenvalue of the largest magnitude), trace and Frobenius norm are of the training loss on some of them. SAM's "
    "rise is that at its ascent step: the slope alone gives its first order, most of it where training has not ended, "
    "and what lies beyond is curvature. The mean rise is along random filter-normalised directions; normal noise of "
    "standard deviation sigma on the weights costs as much accuracy (or loss) as its target says. 'central': one "
    "client holds all data. A barrier stands above the straight line between the ends' values (the chord), above the "
    "worse end, and at the worst point of the line; for accuracy below them. One figure alone misleads. Figures of "
    "several lines of one kind are averaged."
)
_DIFFERENCES = (
    "Settings that differ in their partition alone, each at its chosen learning rate: differences are paired by seed, "
    "± half the 95 % interval, bold, ▲ or ▼ where that lies above or below 0; of twenty that are nothing one is by "
    "chance. One client that holds all data ('central') is compared with federations of its data, model and mask rule, "
    "whatever else they set."
)
_ROUNDS = (
    "A line is a setting: the mean over seeds, in a band from the lowest seed to the highest. Axes are logarithmic "
    "where values lie far apart."
)


def sections(table: Sequence[Row], runs: Sequence[Run]) -> tuple[list[Section], list[Problem]]:
    """Show loss landscapes, if any run has one.

    Args:
        table: rows of the report.
        runs: all of its runs, those of other learning rates too: what is correlated.

    Returns:
        The sections, and files that could not be read.

    """
    found, problems = read(runs)
    shown = settings(table, found)
    parts: Sequence[tuple[str, str, Sequence[Table | Picture]]] = (
        ("Loss landscapes", _TEXT, [*_tables(shown), *_drawn(shown)]),
        ("Loss landscapes by partition", _DIFFERENCES, _differences(shown)),
        ("Loss landscapes over rounds", _ROUNDS, _over_rounds(shown)),
    )
    return [*(Section(*part) for part in parts if part[2]), *reading(found)], problems


def written(found: Interval, sign: str = "") -> str:
    """Write an interval to three digits, of the half width where that is larger.

    >>> written(Interval(1234.5, 67.8)), written(Interval(0.01234, 0.005)), written(Interval(0.001, 0.5))
    ('1234 ± 68', '0.0123 ± 0.0050', '0.001 ± 0.500')
    """
    largest = max(abs(found.mean), 0.0 if math.isnan(found.half) else found.half)
    place = math.floor(math.log10(largest)) if largest > 0 else 0
    return found.text(digits=min(max(_DIGITS - 1 - place, 0), _MOST), sign=sign)


def pairs(shown: Sequence[Setting]) -> list[tuple[Setting, list[Setting]]]:
    """Find settings that differ in their partition alone, each group's IID one (or first) before the others.

    One client that holds all data stands with every group of its data, model and mask: it has no federation to share.
    """
    groups: dict[tuple, list[Setting]] = {}
    for one in shown:
        if not one.central:
            groups.setdefault(_shared(one), []).append(one)
    central = [one for one in shown if one.central]
    found = []
    for group in groups.values():
        first = min(group, key=lambda one: (one.row.settings["partition"] != "iid", one.partition))
        others = [one for one in group if one is not first]
        found.append((first, [*others, *(one for one in central if _task(one) == _task(first))]))
    return [(first, others) for first, others in found if others]


def _shared(one: Setting) -> tuple:
    kept = {key: value for key, value in one.row.settings.items() if key.split(".")[0] not in _UNLIKE}
    return one.how, tuple(sorted(kept.items()))


def _task(one: Setting) -> tuple:
    kept = {key: value for key, value in one.row.settings.items() if key.split(".")[0] in _TASK and key != _BATCH}
    return one.how, tuple(sorted(kept.items()))


def _tables(shown: Sequence[Setting]) -> list[Table]:
    """Lay out a table each of the model, of sharpness and of barriers, where a landscape has any of it."""
    last = [one for one in shown if one.last]
    masked = any(one.row.sparsity for one in last)
    head = [rule_head([one.row for one in last]), "partition", *["sparsity"] * masked]
    tables = []
    for caption, figures in (("Loss and curvature", _MODEL), ("Sharpness", _SHARPNESS)):
        body = [_line(one, masked, figures) for one in last]
        columns = [*head, *(_column(figure) for figure in figures), "seeds"]
        tables += [Table(columns, body, caption)] if any(_has(one, figures) for one in last) else []
    body = [line for one in last for line in _barriers(one, masked)]
    columns = [*head, "line", *(f"{figure}, %" if "accuracy" in figure else figure for figure in BARRIER), "seeds"]
    return [*tables, *([Table(columns, body, "Barriers")] if body else [])]


def _column(figure: str) -> str:
    return {FIRST: "of it first order", REST: "beyond first order"}.get(figure, figure)


def _has(one: Setting, figures: Sequence[str]) -> bool:
    return any(one.by_seed(figure) for figure in figures)


def _name(one: Setting, masked: bool) -> list[str]:
    return [one.name, one.partition, *[share(one.row.sparsity)] * masked]


def _line(one: Setting, masked: bool, figures: Sequence[str]) -> list[str]:
    return [*_name(one, masked), *(_cell(one.over_seeds(figure), figure) for figure in figures), str(len(one.last))]


def _cell(found: Interval, figure: str, sign: str = "") -> str:
    return found.text(sign=sign) if "accuracy" in figure else written(found, sign)


def _barriers(one: Setting, masked: bool) -> list[list[str]]:
    """Write a line for each kind of line and each split, the test set first."""
    lines = dict.fromkeys(line for found in one.last for line in found.lines)
    order = sorted(lines, key=lambda line: (line[1] != "test", line[1], line[0].startswith("client"), line[0]))
    return [
        [
            *_name(one, masked),
            f"{line}, {data}",
            *(_cell(one.over_seeds(barrier_name(line, data, figure)), figure) for figure in BARRIER),
            str(len(one.by_seed(barrier_name(line, data, BARRIER[0])))),
        ]
        for line, data in order
    ]


def _differences(shown: Sequence[Setting]) -> list[Table]:
    """Lay out a table for each group of settings that differ in their partition alone, a line for each figure."""
    tables = []
    for first, others in pairs([one for one in shown if one.last]):
        differing = [one for one in others if one.row.lr != first.row.lr]
        head = ["figure", *(f"{one.partition} against {first.partition}" for one in others)]
        body = [
            [figure.replace(", %", ", points"), *(_difference(one, first, figure) for one in others)]
            for figure in FIGURES
            if _has(first, [figure])
        ]
        seeds = [str(len(_seeds(one) & _seeds(first))) for one in others]
        rates = [["learning rates", *(f"{one.row.lr:g} and {first.row.lr:g}" for one in others)]] * bool(differing)
        sparsity = share(first.row.sparsity) if first.row.sparsity else ""
        caption = ", ".join(filter(None, [first.name, sparsity]))
        tables.append(Table(head, [*body, *rates, ["seeds", *seeds]], caption))
    return tables


def _seeds(one: Setting) -> set[int]:
    return {found.run.seed for found in one.last}


def _difference(one: Setting, first: Setting, figure: str) -> str:
    found = paired(one.by_seed(figure), first.by_seed(figure))
    return mark(_cell(found, figure, "+"), found)


def _over_rounds(shown: Sequence[Setting]) -> list[Picture]:
    """Make a picture for each data set and model with landscapes of several rounds."""
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for one in shown:
        groups.setdefault((*task(one.row.runs[0]), one.how), []).append(one)
    drawn = {", ".join(filter(None, name)): group for name, group in groups.items() if several_rounds(group)}
    return [
        Picture(f"landscapes-{slug(name)}", f"Landscapes over rounds: {name}", _drawer(group))
        for name, group in drawn.items()
    ]


def _drawer(group: Sequence[Setting]) -> Callable[[], Figure]:
    return lambda: rounds_figure(group)


def _drawn(shown: Sequence[Setting]) -> list[Table]:
    """Name the pictures that each setting's first run has drawn of its last round."""
    body = []
    for one in (one for one in shown if one.last):
        run = one.last[0].run
        names = sorted(path.name for path in (run.folder / LANDSCAPE).glob("*.png") if _PICTURE.fullmatch(path.name))
        body += [[one.name, one.partition, f"{run.name}/{LANDSCAPE}", ", ".join(names)]] if names else []
    head = ["setting", "partition", "folder", "pictures"]
    return [Table(head, body, "Pictures that the first run of a setting has drawn")] if body else []
