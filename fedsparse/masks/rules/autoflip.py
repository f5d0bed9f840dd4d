"""AutoFLIP: train what moved most while the clients explored the loss around their common start.

Internò et al. (arXiv 2405.10271). The deviation comes from the explore phase; here it becomes a mask.

Shapes: ``P`` coordinates of the space, ``K`` clients, ``n`` coordinates that train.
"""

from __future__ import annotations

from torch import Tensor

from fedsparse.core.checks import check_choice, check_flag
from fedsparse.core.space import ParamSpace
from fedsparse.masks.deviations import check_how, normalise
from fedsparse.masks.evidence import Evidence, Exploration, Need, Updates
from fedsparse.masks.quantiles import above_quantile
from fedsparse.masks.rule import MaskRule
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
        refine: add the agreement, after the first learning round.

    Raises:
        ValueError: an option outside these choices.

    """

    needs: tuple[Need, ...] = (Exploration(),)

    def __init__(self, normalise: str = "minmax", compat: str | None = None, refine: bool = False) -> None:
        check_how(normalise)
        check_choice("mask_rule.compat", compat, None, "original")
        check_flag("mask_rule.refine", refine)
        self.normalise, self.compat, self.refine = normalise, compat, refine
        if refine:
            self.needs = (Exploration(), Updates(keep="last", absent="mean"))

    def of_update(self, change: Tensor, start: Tensor) -> Tensor:
        """Take the direction of every update: -1, 0 or 1, (K, n); agreement is about where the clients stand now."""
        return change.sign()

    def scores(self, evidence: Evidence) -> Tensor:
        """Normalise the deviation, and add the agreement; with ``compat=original`` choose: bool (P,).

        Raises:
            ValueError: no exploration, or with ``compat=original`` a sparsity that a quantile cannot give.

        """
        scores = normalise(evidence.measured, evidence.space, self.normalise, self.compat)
        if self.refine and evidence.updates is not None:
            scores += evidence.updates.abs()
        return _strict(scores, evidence.space, evidence.sparsity) if self.compat else scores


def _strict(scores: Tensor, space: ParamSpace, sparsity: Sparsity) -> Tensor:
    """Keep what lies strictly above the quantile of all scores, as the original does, and ``always_train``."""
    for option, plain in (("scope", "global"), ("unit", "coordinate"), ("min_density", 0.0)):
        if (given := getattr(sparsity, option)) != plain:
            text = f"mask_rule.compat=original takes one quantile over all coordinates; set sparsity.{option}={plain}"
            raise ValueError(f"{text}, not {given}")
    return above_quantile(scores, sparsity.ratio) | space.where(sparsity.always_train).to(scores.device)
