"""Movement pruning (Sanh et al. 2020): which coordinates training moves away from zero.

Shapes: ``P`` coordinates of the space, ``K`` clients, ``n`` coordinates that train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.masks.mask import Mask
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity


class Movement(MaskRule):
    r"""Scores by how far training moves a coordinate away from zero (Sanh et al. 2020, movement pruning).

    .. math:: s_j = \sum_t \theta_{tj} \, \overline{\Delta}_{tj}

    with :math:`\theta_t` the global value before round t and :math:`\overline{\Delta}_t` the weighted mean of the
    clients' changes: the paper's sum over steps of -lr * gradient * weight, a round at a time. A coordinate that no
    longer trains keeps its score. Before anything is heard there is nothing to choose by: the first mask must be of
    density 1.
    """

    listens = True

    def hear(self, change: Tensor, start: Tensor) -> Tensor:
        """Multiply: positive where a value moves away from zero, (K, n)."""
        return start * change

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
        """Choose the coordinates that moved away from zero the most; all of them before anything is heard.

        Args:
            space: the coordinates.
            row: not read.
            sparsity: how many train.
            observed: not read.
            generator: not read.
            memory: the sum over rounds (P,).

        Raises:
            ValueError: a choice is asked for before anything was heard, or scores that allow none (``select``).

        """
        if memory is None and sparsity.density < 1:
            raise ValueError(
                "mask_rule=movement chooses by what training moved, so all must train at first: "
                "give it a schedule that starts at 0, such as sparsity=gradual80"
            )
        scores = torch.zeros(space.size) if memory is None else memory
        return Mask.of(
            space, select(scores, space, sparsity, largest=True), rule=type(self).__name__, **sparsity.metadata
        )
