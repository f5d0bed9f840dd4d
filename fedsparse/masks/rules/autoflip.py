"""AutoFLIP: train what moved most while the clients explored the loss around their common start.

Internò et al. (arXiv 2405.10271). The deviation comes from the explore phase; here it becomes a mask.

Shapes: ``P`` coordinates of the space, ``K`` clients, ``n`` coordinates that train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_flag
from fedsparse.core.space import ParamSpace
from fedsparse.masks.deviations import check_how, normalise
from fedsparse.masks.mask import Mask
from fedsparse.masks.quantiles import above_quantile
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity


class AutoFLIP(MaskRule):
    r"""Scores by the squared deviation of the exploring clients, normalised tensor by tensor.

    With ``refine`` the clients' agreement in the last training round is added, as outlined in the paper's later
    versions:

    .. math:: s_j = g_j + \left| \sum_k w_k \, \mathrm{sign}(\Delta_{kj}) / \sum_k w_k \right|

    with :math:`\Delta_{kj}` the update of client k and :math:`w_k` its weight. The second term lies in [0, 1]; where
    nothing trained it is the mean of where something did, so that of two coordinates of equal deviation the one that
    clients disagree about gives way to the one that does not train.

    Args:
        normalise: ``minmax`` (the original's default), ``robust``, ``rank`` or ``none``; see ``deviations.normalise``.
        compat: None keeps exactly k; ``original`` keeps what lies strictly above the linearly interpolated quantile
            ``sparsity.ratio`` of all scores, those of ``always_train`` included: fewer than k where scores tie. The
            original prunes every tensor, biases and the output layer too: that is ``sparsity.always_train=[]``. Its
            median is the lower of two.
        refine: add the agreement, where a training round has been heard.

    Raises:
        ValueError: an option outside these choices.

    """

    explores = True

    def __init__(self, normalise: str = "minmax", compat: str | None = None, refine: bool = False) -> None:
        check_how(normalise)
        check_choice("mask_rule.compat", compat, None, "original")
        check_flag("mask_rule.refine", refine)
        self.normalise, self.compat, self.refine = normalise, compat, refine
        self.listens = refine

    def hear(self, change: Tensor, start: Tensor) -> Tensor | None:
        """Give the direction of every update: -1, 0 or 1, (K, n); None without ``refine``."""
        return change.sign() if self.refine else None

    def unheard(self, heard: Tensor) -> float:
        """Let what did not train count as agreed upon as the mean of what did: so it can train again."""
        return float(heard.abs().mean())

    def remember(self, memory: Tensor | None, heard: Tensor) -> Tensor:
        """Keep the last round alone: agreement is about where the clients stand now."""
        return heard

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        memory: Tensor | None = None,
    ) -> Mask:
        """Choose the coordinates of highest score.

        Args:
            space: the coordinates.
            row: not read.
            sparsity: how many train.
            observed: the deviation before it is normalised (P,); see ``deviations.deviation``.
            generator: not read.
            memory: signed agreement of the last round (P,), read with ``refine``.

        Raises:
            ValueError: no observations, scores that allow no choice (``select``), or with ``compat=original`` a
                sparsity that a quantile cannot give.

        """
        if observed is None:
            raise ValueError("mask_rule=autoflip chooses by what clients found: it needs a phase that explores")
        scores = normalise(observed, space, self.normalise, self.compat)
        if self.refine and memory is not None:
            scores += memory.abs()
        chosen = _strict(scores, space, sparsity) if self.compat else select(scores, space, sparsity, largest=True)
        return Mask.of(space, chosen, rule=type(self).__name__, **sparsity.metadata)


def _strict(scores: Tensor, space: ParamSpace, sparsity: Sparsity) -> Tensor:
    """Keep what lies strictly above the quantile of all scores, as the original does, and ``always_train``."""
    for option, plain in (("scope", "global"), ("unit", "coordinate"), ("min_density", 0.0)):
        if (given := getattr(sparsity, option)) != plain:
            text = f"mask_rule.compat=original takes one quantile over all coordinates; set sparsity.{option}={plain}"
            raise ValueError(f"{text}, not {given}")
    return above_quantile(scores, sparsity.ratio) | space.where(sparsity.always_train).to(scores.device)
