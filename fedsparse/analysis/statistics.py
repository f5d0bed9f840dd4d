"""What a few seeds say: means, 95 % intervals, and differences between runs of the same seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fedsparse.analysis.files import DASH

_NOTHING = 1e-9  # differences as small as this are rounding


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % confidence interval (Student's t).

    ``half`` is NaN for a single value, both are NaN for none.
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Estimate from independent values.

        >>> Interval.of([0.9, 0.92, 0.94]).half  # doctest: +ELLIPSIS
        0.0496...
        """
        n = len(values)
        if not n:
            return cls(math.nan, math.nan)
        spread = float(np.std(values, ddof=1)) if n > 1 else math.nan
        return cls(float(np.mean(values)), float(stats.t.ppf(0.975, max(1, n - 1))) * spread / math.sqrt(n))

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval; False where there is none."""
        return abs(self.mean) > self.half + _NOTHING

    def text(self, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
        """Write mean and half width, times a scale; a dash where there is nothing.

        >>> Interval(0.5, 0.1).text(100)
        '50.0 ± 10.0'
        """
        if math.isnan(self.mean):
            return DASH
        half = "" if math.isnan(self.half) else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{half}"

    def percent(self, sign: str = "") -> str:
        """Write as per cent, without the sign of it."""
        return self.text(100, 1, sign)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Estimate the mean difference one - other over the seeds that both have.

    The same seed draws the same partition and the same clients, so what they share cancels: the interval is that of
    the paired t-test, and narrower than two separate ones suggest.

    >>> paired({0: 0.5, 1: 0.75, 7: 0.1}, {0: 0.25, 1: 0.5})
    Interval(mean=0.25, half=0.0)

    """
    return Interval.of([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
