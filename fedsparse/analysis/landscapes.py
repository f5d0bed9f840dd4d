"""Loss landscapes of runs as plain figures, from the files ``landscape.json``; those of one setting stand together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fedsparse.analysis.files import finite, json_of, short
from fedsparse.analysis.folders import Problem, Run
from fedsparse.analysis.statistics import Interval
from fedsparse.analysis.table import Row
from fedsparse.core.folder import LANDSCAPE, LANDSCAPE_FIGURES

LOSS, ACCURACY, DISTANCE = "training loss", "test accuracy, %", "distance between clients"
RISE, FIRST, REST = "SAM rise", "SAM rise, first order", "SAM rise, beyond first order"
# figure -> the keys and places that lead to it
_PATHS: Mapping[str, tuple[str | int, ...]] = {
    LOSS: ("models", "models", "global", "train", "loss"),
    ACCURACY: ("models", "models", "global", "test", "accuracy"),
    "lambda_1": ("curvature", "eigenvalues", 0),
    "trace": ("curvature", "trace"),
    "Frobenius norm": ("curvature", "frobenius"),
    RISE: ("sharpness", "sam", "rise"),
    FIRST: ("sharpness", "sam", "first_order"),
    "mean rise": ("sharpness", "mean_rise", "rise"),
    "sigma": ("sharpness", "sigma", "value"),
    "PAC-Bayes bound": ("sharpness", "pac_bayes", "bound"),
    "path norm": ("sharpness", "path_norm", "value"),
}
_PARTS = ("models", "curvature", "sharpness")
WORST = "at the worst point"
_BARRIERS = {"loss": "loss_barrier", "accuracy": "accuracy_barrier"}
_ABOVE = {
    "loss": {"above_chord": "above the chord", "above_worse_end": "above the worse end", "worst": WORST},
    "accuracy": {"above_chord": "below the chord", "above_worse_end": "below the worse end", "worst": WORST},
}
# the figures of a barrier, as columns
BARRIER = tuple(f"{kind}, {words}" for kind, found in _ABOVE.items() for words in found.values())
LINES = ("global to client", "client to client")
_DATA = re.compile(r"lines (test|train|client:\d{1,9})")
_ENDS = re.compile(r"(global|client|reference)(?: \d{1,9})?")
# options that change what a figure means, and what stands for them where they are not said
_HOW: Mapping[str, Any] = {"mask": "all", "samples": None, "sigma_of": "accuracy"}
CENTRAL = "central"


@dataclass(frozen=True)
class Landscape:
    """Figures of one model: a run after so many rounds.

    Attributes:
        run: the run.
        round: rounds closed.
        last: whether the run ended there.
        how: options that change what the figures mean, "" for the defaults.
        figures: what is there, by its name; accuracies in per cent.
        lines: (line, data) of the barriers among them.

    """

    run: Run
    round: int
    last: bool
    how: str
    figures: Mapping[str, float] = field(repr=False)
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Setting:
    """Landscapes of runs that differ in their seed alone.

    Attributes:
        row: the runs.
        how: options of their landscapes.
        found: one for each seed and round.

    """

    row: Row
    how: str
    found: tuple[Landscape, ...]

    @property
    def name(self) -> str:
        """Mask rule and what else differs, with the landscapes' options."""
        return ", ".join(filter(None, [self.row.name, self.how]))

    @property
    def partition(self) -> str:
        """How the data are dealt; one client alone holds them centrally."""
        return CENTRAL if self.central else self.row.partition

    @property
    def central(self) -> bool:
        """Whether one client holds all data."""
        return self.row.settings.get("federation.num_clients") == "1"

    @property
    def last(self) -> tuple[Landscape, ...]:
        """Landscapes of the last round."""
        return tuple(one for one in self.found if one.last)

    def by_seed(self, figure: str) -> dict[int, float]:
        """Give a figure of the last round by seed, where it is there."""
        return {one.run.seed: one.figures[figure] for one in self.last if figure in one.figures}

    def over_seeds(self, figure: str) -> Interval:
        """Estimate a figure of the last round."""
        return Interval.of(list(self.by_seed(figure).values()))

    def over_rounds(self, figure: str) -> dict[int, list[float]]:
        """Give a figure by round, one value for each seed that has it."""
        values: dict[int, list[float]] = {}
        for one in self.found:
            if figure in one.figures:
                values.setdefault(one.round, []).append(one.figures[figure])
        return {round_: values[round_] for round_ in sorted(values)}


def barrier_name(line: str, data: str, figure: str) -> str:
    """Name a figure of a barrier.

    >>> barrier_name("client to client", "test", "loss, above the chord")
    'client to client, test: loss, above the chord'
    """
    return f"{line}, {data}: {figure}"


# what is compared and read, of barriers those on the test set: two of loss, one of accuracy
FIGURES = (
    *(LOSS, ACCURACY, "lambda_1", "trace", "Frobenius norm", RISE, FIRST, REST, "mean rise", "sigma"),
    *("PAC-Bayes bound", "path norm", DISTANCE),
    *(barrier_name(line, "test", BARRIER[place]) for line in LINES for place in (0, 2, 5)),
)


def settings(table: Sequence[Row], found: Sequence[Landscape]) -> list[Setting]:
    """Gather the landscapes of each row's runs, apart where their options differ.

    Sorted by data, model, sparsity, partition and name.
    """
    rows = {run.name: number for number, row in enumerate(table) for run in row.runs}
    groups: dict[tuple[int, str], list[Landscape]] = {}
    for one in (one for one in found if one.run.name in rows):
        groups.setdefault((rows[one.run.name], one.how), []).append(one)
    listed = [Setting(table[number], how, tuple(group)) for (number, how), group in groups.items()]
    return sorted(listed, key=lambda one: (*task(one.row.runs[0]), one.row.sparsity, one.partition, one.name))


def task(run: Run) -> tuple[str, str]:
    """Name data and model of a run: figures of others are on other scales."""
    return run.config["data"], run.config["model"]


def read(runs: Iterable[Run]) -> tuple[list[Landscape], list[Problem]]:
    """Read every landscape of some runs, the last round's and earlier ones.

    Returns:
        What was read, in the order of runs and rounds, and the files that could not be.

    """
    found: list[Landscape] = []
    problems: list[Problem] = []
    for run in runs:
        rounds: dict[int, Landscape] = {}
        for path in _paths(run.folder / LANDSCAPE):
            try:
                one = _read(run, path)
                rounds.setdefault(one.round, one)  # the last round's file comes first
            except (OSError, ValueError, RecursionError) as error:
                where = "" if path.parent.name == LANDSCAPE else f"{LANDSCAPE}/{short(path.parent.name)}: "
                problems.append(Problem(run.name, f"{where}{_why(error)}; not in the landscapes"))
        found += [rounds[closed] for closed in sorted(rounds)]
    return found, problems


def _paths(folder: Path) -> Iterator[Path]:
    """Find the file of the last round, then those of others by their names."""
    rounds = sorted(folder.glob(f"round_*/{LANDSCAPE_FIGURES}")) if folder.is_dir() else []
    yield from (path for path in (folder / LANDSCAPE_FIGURES, *rounds) if path.exists() or path.is_symlink())


def _why(error: Exception) -> str:
    """Say in one line why a file cannot be read, without the place where it lies."""
    if isinstance(error, OSError):
        return f"{LANDSCAPE_FIGURES} cannot be read: {error.strerror}"
    return f"{LANDSCAPE_FIGURES} is damaged: it is not JSON" if isinstance(error, RecursionError) else str(error)


def _read(run: Run, path: Path) -> Landscape:
    """Read one file, or say in a ValueError why it is none of a landscape of this run."""
    tree = json_of(path)
    closed: Any = tree.get("round")
    rounds: Any = run.summary.get("rounds")
    if not (finite(closed) and closed >= 0 and float(closed).is_integer()):
        raise ValueError(f"{LANDSCAPE_FIGURES} is damaged: it holds no round")
    if path.parent.name not in (LANDSCAPE, f"round_{int(closed)}"):
        raise ValueError(f"{LANDSCAPE_FIGURES} is of another folder: it is of round {int(closed)}")
    if finite(rounds) and closed > rounds:
        raise ValueError(f"{LANDSCAPE_FIGURES} is of another run: it is of round {int(closed)}, the run has {rounds:g}")
    wrong = [name for name in tree if (name in _PARTS or _DATA.fullmatch(name)) and not isinstance(tree[name], Mapping)]
    if wrong:
        raise ValueError(f"{LANDSCAPE_FIGURES} is damaged: its {', '.join(wrong)} holds no keys")
    last = closed == rounds if finite(rounds) else path.parent.name == LANDSCAPE
    lines = dict(chain.from_iterable(_lines(name, part) for name, part in tree.items() if _DATA.fullmatch(name)))
    barriers = {barrier_name(*line, figure): value for line, found in lines.items() for figure, value in found.items()}
    return Landscape(run, int(closed), last, _how(tree.get("options")), _figures(tree) | barriers, tuple(lines))


def _figures(tree: Mapping[str, Any]) -> dict[str, float]:
    """Take the figures of the models, curvature and sharpness that are there."""
    found = {name: value for name, path in _PATHS.items() if finite(value := _at(tree, path))}
    if ACCURACY in found:
        if not 0 <= found[ACCURACY] <= 1:
            raise ValueError(f"{LANDSCAPE_FIGURES} is damaged: it holds no number from 0 to 1 for the test accuracy")
        found[ACCURACY] *= 100
    if RISE in found and FIRST in found:
        found[REST] = found[RISE] - found[FIRST]
    distances = _at(tree, ("models", "distances"))
    between = distances if isinstance(distances, Mapping) else {}
    apart = [value for name, value in between.items() if _line(name) == "client to client" and finite(value)]
    return found | ({DISTANCE: sum(apart) / len(apart)} if apart else {})


def _lines(name: str, part: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """Give the barriers on one split, the mean over lines whose ends are of the same kinds."""
    groups: dict[str, list[Any]] = {}
    listed = part.get("lines")
    for ends, found in (listed if isinstance(listed, Mapping) else {}).items():
        if line := _line(ends):
            groups.setdefault(line, []).append(found)
    for line, several in groups.items():
        yield (line, name.removeprefix("lines ")), _barrier(several)


def _barrier(several: Sequence[Any]) -> dict[str, float]:
    """Give the figures of a barrier, the mean over lines where they are there; accuracies in per cent."""
    figures: dict[str, float] = {}
    for quantity, key in _BARRIERS.items():
        scale = 100 if quantity == "accuracy" else 1
        for place, words in _ABOVE[quantity].items():
            values = [scale * value for one in several if finite(value := _at(one, (key, place)))]
            figures |= {f"{quantity}, {words}": sum(values) / len(values)} if values else {}
    return figures


def _line(ends: str) -> str:
    """Name the kinds of a line's ends, "" if they are no models.

    >>> _line("global to client 3"), _line("client 0 to client 12"), _line("here to there")
    ('global to client', 'client to client', '')
    """
    kinds = [_ENDS.fullmatch(end) for end in ends.split(" to ")]
    return " to ".join(kind[1] for kind in kinds if kind) if len(kinds) == 2 and all(kinds) else ""


def _at(tree: Any, path: Sequence[str | int]) -> Any:
    """Follow keys of mappings and places of lists; None where the way ends before."""
    for step in path:
        if isinstance(step, int):
            tree = tree[step] if isinstance(tree, list) and len(tree) > step else None
        else:
            tree = tree.get(step) if isinstance(tree, Mapping) else None
    return tree


def _how(options: Any) -> str:
    """Write the options that change what figures mean.

    >>> _how({"mask": "inside", "samples": 64, "grid": 5, "sigma_of": "accuracy"})
    'mask=inside, samples=64'
    """
    said = options if isinstance(options, Mapping) else {}
    chosen = {key: said.get(key, usual) for key, usual in _HOW.items()}
    return ", ".join(f"{key}={short(str(value))}" for key, value in chosen.items() if value != _HOW[key])
