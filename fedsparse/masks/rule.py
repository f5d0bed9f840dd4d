"""What a mask rule is: it scores every coordinate from evidence; how many train is not its concern.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch, ``K`` clients, ``n`` coordinates that train.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace
from fedsparse.masks.evidence import Batches, Evidence, N, Need, Thinning, calibration, find
from fedsparse.masks.gradients import Losses
from fedsparse.masks.sparsity import Sparsity


class MaskRule:
    """Scores every coordinate; ``choose`` makes the mask of the best ones.

    A rule of one's own defines ``scores``; one that needs ``Batches`` or ``Thinning`` also ``observe``, and one that
    needs ``Updates`` also ``of_update``.

    Attributes:
        largest: whether the largest scores train, or the smallest.
        needs: the evidence that the rule needs beside the row; those of the class name the kinds, which are read
            before a rule is built; an object's have its options.

    >>> from fedsparse.masks import choose
    >>> class Heaviest(MaskRule):
    ...     def scores(self, evidence):
    ...         return evidence.row.abs()
    >>> space = ParamSpace(["fc.weight"], [torch.Size([4])])
    >>> mask = choose(Heaviest(), Evidence(space, torch.tensor([1.0, -4.0, 2.0, 3.0]), Sparsity(0.5)))
    >>> mask.tensors["fc.weight"]
    tensor([False,  True, False,  True])

    """

    largest: bool = True
    needs: tuple[Need, ...] = ()

    def scores(self, evidence: Evidence) -> Tensor:
        """Score every coordinate.

        Returns:
            (P,), float32 or float64; or bool (P,), the choice itself, whatever the sparsity.

        """
        raise NotImplementedError(f"the rule {type(self).__name__} has no scores()")

    def observe(
        self,
        net: nn.Module,
        space: ParamSpace,
        x: Tensor,
        y: Tensor,
        *,
        loss: Losses,
        generator: torch.Generator | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Measure one calibration batch.

        Args:
            net: the network, holding the row to score.
            space: the coordinates.
            x: inputs (b, ...).
            y: labels (b,).
            loss: ``loss(forward, x, y)`` gives the losses (b,); ``forward(x)`` gives the logits.
            generator: the randomness of this batch, if the rule draws any.
            into: float64 (P,) to add to, in place, so that no second row is in memory; zeros by default.

        Returns:
            ``into``: batches and clients are summed.

        """
        raise NotImplementedError(f"the rule {type(self).__name__} needs data but has no observe()")

    def of_update(self, change: Tensor, start: Tensor) -> Tensor:
        """Reduce the clients' updates to what the rule scores.

        Args:
            change: what the training of K clients changed in the n coordinates that train (K, n).
            start: the values that they started from (K, n).

        Returns:
            (K, n), of which the weighted mean over clients is gathered (``Updates``).

        """
        raise NotImplementedError(f"the rule {type(self).__name__} needs updates but has no of_update()")

    def metadata(self, sparsity: Sparsity) -> dict[str, str]:
        """Describe a mask in its file: the rule's name, and the sparsity that it follows."""
        return {"rule": type(self).__name__, **sparsity.metadata}

    def need(self, kind: type[N]) -> N | None:
        """Find the rule's need of one kind, if it has it."""
        return find(self.needs, kind)

    @property
    def calibration(self) -> Batches | Thinning | None:
        """What the rule needs of the calibration; None: nothing is measured."""
        return calibration(self.needs)
