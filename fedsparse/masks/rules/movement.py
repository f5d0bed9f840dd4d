"""Movement pruning (Sanh et al. 2020): which coordinates training moves away from zero.

Shapes: ``P`` coordinates of the space, ``K`` clients, ``n`` coordinates that train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.masks.evidence import Evidence, Updates
from fedsparse.masks.rule import MaskRule


class Movement(MaskRule):
    r"""Scores by how far training moves a coordinate away from zero.

    .. math:: s_j = \sum_t \theta_{tj} \, \overline{\Delta}_{tj}

    with :math:`\theta_t` the global value before round t and :math:`\overline{\Delta}_t` the weighted mean of the
    clients' changes: the paper's sum over steps of -lr * gradient * weight, a round at a time. A coordinate that no
    longer trains keeps its score. Before the first round there is nothing to choose by: the first mask must be of
    density 1.
    """

    needs = (Updates(),)

    def of_update(self, change: Tensor, start: Tensor) -> Tensor:
        """Multiply: positive where a value moves away from zero, (K, n)."""
        return start * change

    def scores(self, evidence: Evidence) -> Tensor:
        """Take the sum over rounds; before the first, all are equal.

        Raises:
            ValueError: a choice is asked for before the first round.

        """
        if evidence.updates is not None:
            return evidence.updates
        if evidence.sparsity.density < 1:
            raise ValueError(
                "mask_rule=movement chooses by what training moved, so all must train at first: "
                "give it a schedule that starts at 0, such as sparsity=gradual80"
            )
        return torch.zeros(evidence.space.size)
