"""TaLoS: the least sensitive coordinates, thinned out in several calibration rounds.

Iurada et al. 2025, "Efficient Model Editing with Task-Localized Sparse Fine-tuning", as in the authors' code: labels
are drawn from the model, the score is the squared gradient of the drawn label's logit, and the coordinates that are
frozen already are shrunk while the others are scored again.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch, ``C`` classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedsparse.core.checks import check_choice, check_number, check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.masks.evidence import Thinning
from fedsparse.masks.gradients import Forward, Losses
from fedsparse.masks.rules.fisher import Fisher
from fedsparse.masks.scores import LabelledBatches, trainable_space
from fedsparse.masks.thinning import shrunk
from fedsparse.masks.topk import top_fraction

SHRINK = 0.1


def talos(net: nn.Module, batches: LabelledBatches, keep: float, rounds: int, generator: torch.Generator) -> Tensor:
    r"""Choose the coordinates that train by TaLoS, over all trainable parameters of a network.

    In round r of R the :math:`\lfloor k^{r/R} P + 1/2 \rfloor` lowest scores among those still training go on, k the
    fraction to keep; ties go to the lowest index. Frozen ones never return, and are scored at a tenth of their value.

    Args:
        net: the network; it comes back as it was.
        batches: pairs of inputs (b, ...) and labels (b,), which are not read; gone through once a round.
        keep: fraction of the coordinates that trains in the end, in (0, 1].
        rounds: R, at least 1.
        generator: draws the labels.

    Returns:
        bool (P,), in the order of ``net.named_parameters()``, True where a coordinate trains.

    Raises:
        ValueError: a fraction or a number of rounds outside these, or batches that are empty in some round (an iterator
            is, in the second).

    """
    _check_schedule(keep, rounds)
    rule, space, left = Talos(), trainable_space(net), None
    row = space.read(net)
    try:
        for round in range(rounds):
            space.write(net, shrunk(row, left, SHRINK))
            observed = _observe(rule, net, space, batches, generator, round)
            scores = observed if left is None else observed.masked_fill_(~left, math.inf)
            left = top_fraction(scores, keep ** ((round + 1) / rounds), largest=False)
    finally:
        space.write(net, row)
    assert left is not None  # rounds is at least 1
    return left


class Talos(Fisher):
    """Trains the least sensitive coordinates, thinned out over ``calibration.rounds``; one round thins them at once.

    Args:
        score: ``logit``: squared gradient of the drawn label's logit; ``logprob``: of its log-probability.
        shrink: factor on the frozen coordinates' values while the others are scored, from 0 to 1.
        chunk: samples differentiated at once; None chooses by the size of the model and the device.

    Raises:
        ValueError: an option outside these choices.

    """

    needs = (Thinning(SHRINK),)

    def __init__(self, score: str = "logit", shrink: float = SHRINK, chunk: int | None = None) -> None:
        super().__init__(largest=False, labels="model", chunk=chunk)
        check_choice("mask_rule.score", score, *SCORES)
        check_number("mask_rule.shrink", shrink, least=0, most=1)
        self.score, self.needs = score, (Thinning(shrink),)

    def differentiated(self, loss: Losses) -> Losses:
        """Differentiate the drawn label's logit, or its log-probability, whatever the clients learn by."""
        return SCORES[self.score]


def _logit(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    """Take each sample's logit of its label: (b,)."""
    return forward(x).gather(1, y.unsqueeze(1)).squeeze(1)


def _logprob(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    """Take each sample's log-probability of its label: (b,)."""
    return forward(x).log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


SCORES: dict[str, Losses] = {"logit": _logit, "logprob": _logprob}


def _check_schedule(keep: float, rounds: int) -> None:
    check_whole("rounds", rounds, 1)
    check_number("keep", keep, above=0, most=1)


def _observe(
    rule: Talos, net: nn.Module, space: ParamSpace, batches: LabelledBatches, generator: torch.Generator, round: int
) -> Tensor:
    """Sum the scores of one round: float64 (P,)."""
    total, seen = torch.zeros(space.size, dtype=torch.float64, device=space.tensors(net)[0].device), 0
    for x, y in batches:
        rule.observe(net, space, x, y, loss=SCORES[rule.score], generator=generator, into=total)
        seen += len(x)
    if not seen:
        raise ValueError(f"the batches held no samples in round {round + 1}; hand in a list or a loader, no iterator")
    return total
