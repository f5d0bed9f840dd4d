"""Masks by sensitivity: which coordinates move the loss most, or least.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fedsparse.core.checks import check_choice, check_flag, check_number
from fedsparse.core.space import ParamSpace
from fedsparse.masks.evidence import Batches, Evidence, Need
from fedsparse.masks.gradients import Losses
from fedsparse.masks.rule import MaskRule
from fedsparse.masks.scores import fisher_batch, fisher_per_sample


class Fisher(MaskRule):
    """Scores by the diagonal Fisher information: how much a coordinate's change moves the loss.

    The least sensitive coordinates train in TaLoS (Iurada et al. 2025, "Efficient Model Editing with Task-Localized
    Sparse Fine-tuning"), the most sensitive ones in FISH masks (Sung et al. 2021).

    Args:
        largest: train the most sensitive coordinates, or the least sensitive.
        fisher: ``sample``: squared gradients of single samples; ``batch``: the squared gradient of a batch.
        labels: ``data``: the given labels; ``model``: labels drawn from the model.
        chunk: samples differentiated at once; None chooses by the size of the model and the device.

    Raises:
        ValueError: an option outside these choices.

    """

    needs: tuple[Need, ...] = (Batches(),)

    def __init__(self, largest: bool, fisher: str = "sample", labels: str = "data", chunk: int | None = None) -> None:
        check_flag("mask_rule.largest", largest)
        check_choice("calibration.fisher", fisher, "sample", "batch")
        check_choice("calibration.labels", labels, "data", "model")
        check_number("mask_rule.chunk", chunk, least=1, whole=True, null=True)
        self.largest, self.fisher, self.labels, self.chunk = largest, fisher, labels, chunk

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
        """Add the squared gradients of one batch: float64 (P,)."""
        measure = fisher_batch if self.fisher == "batch" else partial(fisher_per_sample, chunk=self.chunk)
        loss = self.differentiated(loss)
        return measure(net, space, x, y, loss=loss, generator=generator, labels=self.labels, into=into)

    def differentiated(self, loss: Losses) -> Losses:
        """Choose what is differentiated: the clients' losses, as they are."""
        return loss

    def scores(self, evidence: Evidence) -> Tensor:
        """Take the summed observations as they are: a mean would give the same order."""
        return evidence.measured
