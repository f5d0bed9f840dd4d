"""What figures of a landscape say of test accuracy: rank correlations over runs, and those given the training loss.

Shapes: R runs, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fedsparse.analysis.files import DASH
from fedsparse.analysis.landscapes import ACCURACY, FIGURES, LOSS, WORST, Landscape, task
from fedsparse.analysis.page import Bold, Section, Table

FEWEST = 6  # runs of which a correlation is shown
_DRAWS = 1999
_TEXT = (
    "Does a figure of the last round's landscape go with test accuracy? Spearman's rank correlation over runs says "
    "how far. The training loss orders runs by how far they have come, and most figures follow it: only the partial "
    "correlation 'given the training loss', that of the residuals after linear regression of both ranks on the ranks "
    "of the training loss, can say that a figure means more. 'By chance': 95 % of random orders of the figure's ranks "
    "stay within it; a partial correlation beyond it is bold. {verdicts} Few runs say little; runs of one setting "
    "differ by seed alone, and count for less than as many settings; of twenty figures that mean nothing one or two "
    "lie beyond chance; and none of this is a cause."
)
_HEAD = ("figure", "runs", "rank correlation", "by chance", "given the training loss", "by chance")


@dataclass(frozen=True)
class Correlation:
    """How a figure goes with test accuracy.

    Attributes:
        figure: its name.
        runs: in which both and the training loss are known.
        alone: rank correlation.
        alone_chance: what 95 % of random orders stay within.
        given: partial rank correlation given the training loss; NaN for that loss itself, or what orders runs as it.
        given_chance: as above.

    """

    figure: str
    runs: int
    alone: float
    alone_chance: float
    given: float
    given_chance: float

    @property
    def beyond(self) -> bool:
        """Whether the partial correlation is larger than chance."""
        return abs(self.given) > self.given_chance


def sections(found: Sequence[Landscape]) -> list[Section]:
    """Read the last round's landscapes of all runs, a table for each data set and model, if there are any."""
    groups: dict[str, list[Landscape]] = {}
    for one in sorted((one for one in found if one.last), key=_group):
        groups.setdefault(_group(one), []).append(one)
    read = [(name, len(group), correlations(group)) for name, group in groups.items()]
    if not read:
        return []
    verdicts = " ".join(verdict(*group) for group in read)
    tables = [Table(_HEAD, [_cells(one) for one in listed], name) for name, _, listed in read if listed]
    return [Section("Loss landscapes and accuracy", _TEXT.format(verdicts=verdicts), tables)]


def verdict(name: str, runs: int, listed: Sequence[Correlation]) -> str:
    """Say what the correlations of one data set and model show, and no more."""
    if not listed:
        return f"{name}: {runs} {'run is' if runs == 1 else 'runs are'} too few, or their figures do not differ."
    alone = next((f"{one.alone:+.2f}" for one in listed if one.figure == LOSS), DASH)
    start = f"{name}, {runs} runs: the training loss alone has {alone}."
    beyond = [f"{one.figure} ({one.given:+.2f})" for one in listed if one.beyond]
    if beyond:
        return f"{start} Given it, beyond chance: {', '.join(beyond)}."
    return (
        f"{start} Given it, no figure goes beyond chance: that a flat minimum means accuracy, these runs do not show."
    )


def correlations(found: Sequence[Landscape]) -> list[Correlation]:
    """Correlate figures of some landscapes with test accuracy; those of fewer than six runs are left out.

    So are the worst points of lines on the test set: the model at the line's end is one, and they go with its accuracy.
    """
    figures = [one.figures for one in found]
    listed = [_correlation(name, figures) for name in FIGURES if name != ACCURACY and not name.endswith(WORST)]
    return [one for one in listed if one is not None]


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Compute Spearman's rank correlation of (R,) and (R,); NaN if either has one value alone."""
    return float(_cosine(_centred(_ranks(x)), _centred(_ranks(y))))


def partial_rank_correlation(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float:
    """Compute the rank correlation of x (R,) and y (R,) given z (R,): that of what regressions of ranks on z's leave.

    NaN where nothing is left, as of a figure that orders the runs as z does.
    """
    given = _centred(_ranks(z))
    return float(_cosine(_left(_centred(_ranks(x)), given), _left(_centred(_ranks(y)), given)))


def by_chance(x: np.ndarray, y: np.ndarray, z: np.ndarray | None = None) -> float:
    """Bound what a rank correlation, given z or without, comes to where x has nothing to do with y and z.

    The ranks of x are put in random order (Draper and Stoneman 1966), always the same ones, whatever the runs' order.
    Where the training loss alone mattered, 2 to 3 % of partial correlations lay beyond at 6 runs and 6 to 10 % at 9 to
    30 (1,500 trials); a bootstrap of runs excluded 0 in 42 % at 9 runs, for two runs out of order then decide the sign.

    Returns:
        The 95 % quantile of the magnitude.

    """
    order = np.lexsort((z if z is not None else x, y, x))
    ranks, against = _centred(_ranks(x[order])), _centred(_ranks(y[order]))
    drawn = np.random.default_rng(0).permuted(np.tile(ranks, (_DRAWS, 1)), axis=1)
    if z is not None:
        given = _centred(_ranks(z[order]))
        drawn, against = _left(drawn, given), _left(against, given)
    found = np.abs(_cosine(drawn, against))
    return float(np.quantile(found[~np.isnan(found)], 0.95)) if not np.isnan(found).all() else float("nan")


def _correlation(name: str, figures: Sequence[Mapping[str, float]]) -> Correlation | None:
    """Correlate one figure; None where runs are few, or it has the same value in all."""
    whole = [one for one in figures if {name, ACCURACY, LOSS} <= one.keys()]
    if len(whole) < FEWEST:
        return None
    x, y, z = (np.array([one[key] for one in whole]) for key in (name, ACCURACY, LOSS))
    alone, given = rank_correlation(x, y), partial_rank_correlation(x, y, z)
    if np.isnan(alone):
        return None
    chance = float("nan") if np.isnan(given) else by_chance(x, y, z)
    return Correlation(name, len(whole), alone, by_chance(x, y), given, chance)


def _group(one: Landscape) -> str:
    """Name data, model and options of a landscape: figures of others are on other scales."""
    return ", ".join(filter(None, [*task(one.run), one.how]))


def _cells(one: Correlation) -> list[str]:
    given = _number(one.given, "+")
    marked = Bold(given) if one.beyond else given
    return [
        one.figure,
        str(one.runs),
        _number(one.alone, "+"),
        _number(one.alone_chance, "±"),
        marked,
        _number(one.given_chance, "±"),
    ]


def _number(value: float, sign: str) -> str:
    if np.isnan(value):
        return DASH
    return f"±{value:.2f}" if sign == "±" else f"{value:+.2f}"


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank (R,) from 1; equal ones share their mean rank."""
    return np.asarray(stats.rankdata(values, axis=-1))


def _centred(values: np.ndarray) -> np.ndarray:
    """Subtract the mean of the last dimension."""
    return values - values.mean(-1, keepdims=True)


def _left(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Residuals of (..., R) after regression on ``given`` (R,), both centred; sums of ranks have no rounding."""
    square = (given * given).sum()
    return values - (values @ given / square)[..., None] * given if square else values


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of (..., R) and (R,); NaN where either is 0."""
    lengths = np.sqrt((one * one).sum(-1) * (other * other).sum())
    return (one @ other) / np.where(lengths > 0, lengths, np.nan)
