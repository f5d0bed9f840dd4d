"""Gradual sparsity: the ratio grows over the rounds, fast at first and slower towards its end."""

from __future__ import annotations

from dataclasses import dataclass

from fedsparse.core.checks import check_share, check_whole


@dataclass(frozen=True)
class Gradual:
    r"""The cubic schedule of Zhu & Gupta 2017, "To prune, or not to prune", equation 1.

    .. math:: s_t = s_f + (s_i - s_f) \left( 1 - \frac{t - t_0}{n \Delta t} \right)^3

    with t the round from 0, :math:`s_f` the final ratio, and t held in between its changes.

    Args:
        initial: :math:`s_i`, the ratio up to round ``begin``, in [0, 1).
        begin: :math:`t_0`, the round from which it grows.
        every: :math:`\Delta t`, rounds between two changes.
        steps: n, how many changes lead to the final ratio; the last is at round begin + every * steps.

    Raises:
        ValueError: an option outside these; the line names it.

    >>> gradual = Gradual(begin=1, every=2, steps=2)
    >>> [round(gradual.ratio(t, 0.8), 2) for t in range(7)]
    [0.0, 0.0, 0.0, 0.7, 0.7, 0.8, 0.8]
    >>> [t for t in range(9) if gradual.changes(t)]
    [3, 5]

    """

    initial: float = 0.0
    begin: int = 0
    every: int = 1
    steps: int = 10

    def __post_init__(self) -> None:
        """Refuse what is not a schedule."""
        check_share("sparsity.schedule.initial", self.initial)
        check_whole("sparsity.schedule.begin", self.begin, 0)
        check_whole("sparsity.schedule.every", self.every, 1)
        check_whole("sparsity.schedule.steps", self.steps, 1)

    def ratio(self, round: int, final: float) -> float:
        """Give the ratio of a round, counted from 0, on the way to the final one."""
        if not (step := self._step(round)):
            return self.initial
        return final + (self.initial - final) * (1 - step / self.steps) ** 3

    def changes(self, round: int) -> bool:
        """Whether the ratio of a round is another than that of the round before."""
        return self._step(round) != self._step(round - 1)

    def _step(self, round: int) -> int:
        """Count the changes up to a round."""
        return min(max(0, (round - self.begin) // self.every), self.steps)
