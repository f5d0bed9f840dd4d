"""The named rules of ``conf/mask_rule``: each scores every coordinate, and the best scores train.

A rule of your own is a subclass with its own ``scores``, a YAML beside the others, and a row in the contract test
(``tests/test_mask_rules.py``).

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fedsparse.masks.mask import Mask
from fedsparse.masks.scores import Losses, fisher_batch, fisher_per_sample
from fedsparse.masks.select import Sparsity, select
from fedsparse.space import ParamSpace


class MaskRule:
    """Scores every coordinate; ``sparsity`` says how many of the best train.

    Attributes:
        largest: whether the largest scores train, or the smallest.
        needs_data: whether ``observe`` wants calibration batches.

    >>> class Heaviest(MaskRule):
    ...     def scores(self, row, observed, generator):
    ...         return row.abs()
    >>> space = ParamSpace(["fc.weight"], [torch.Size([4])])
    >>> mask = Heaviest().mask(space, torch.tensor([1.0, -4.0, 2.0, 3.0]), Sparsity(0.5))
    >>> mask.tensors["fc.weight"]
    tensor([False,  True, False,  True])

    """

    largest: bool = True
    needs_data: bool = False

    def observe(
        self,
        net: nn.Module,
        space: ParamSpace,
        x: Tensor,
        y: Tensor,
        *,
        loss: Losses,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Measure one calibration batch; called only if ``needs_data``.

        Args:
            net: the network, holding the row to score.
            space: the coordinates.
            x: inputs (b, ...).
            y: labels (b,).
            loss: ``loss(forward, x, y)`` gives the losses (b,); ``forward(x)`` gives the logits.
            generator: the randomness of this batch, if the rule draws any.

        Returns:
            float64 (P,), additive: batches and clients are summed before ``scores``.

        """
        raise NotImplementedError(f"the rule {type(self).__name__} needs data but has no observe()")

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Score every coordinate.

        Args:
            row: the pre-trained values (P,).
            observed: the sum of ``observe`` over batches and clients (P,); None without data.
            generator: the randomness of the rule.

        Returns:
            (P,), float32 or float64.

        """
        raise NotImplementedError(f"the rule {type(self).__name__} has no scores()")

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Choose the coordinates that train; the arguments are those of ``scores`` and ``select``.

        Without a generator one of seed 0 is made.

        Raises:
            ValueError: scores that allow no choice (``select``), or missing observations.

        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        chosen = select(self.scores(row, observed, generator), space, sparsity, largest=self.largest)
        return Mask.of(space, chosen, rule=type(self).__name__, ratio=str(sparsity.ratio))


class Fisher(MaskRule):
    """Scores by the diagonal Fisher information: how much a coordinate's change moves the loss.

    The least sensitive coordinates train in TaLoS (Iurada et al. 2025, "Efficient Model Editing with Task-Localized
    Sparse Fine-tuning"), the most sensitive ones in FISH masks (Sung et al. 2021).

    Args:
        largest: train the most sensitive coordinates, or the least sensitive.
        fisher: ``sample``: squared gradients of single samples; ``batch``: the squared gradient of a batch.
        labels: ``data``: the given labels; ``model``: labels drawn from the model.
        chunk: samples differentiated at once; more is faster and takes more memory.

    Raises:
        ValueError: an option outside these choices.

    """

    needs_data = True

    def __init__(self, largest: bool, fisher: str = "sample", labels: str = "data", chunk: int = 8) -> None:
        if fisher not in ("sample", "batch"):
            raise ValueError(f"calibration.fisher must be 'sample' or 'batch', not {fisher!r}")
        if labels not in ("data", "model"):
            raise ValueError(f"calibration.labels must be 'data' or 'model', not {labels!r}")
        if chunk < 1:
            raise ValueError(f"mask_rule.chunk must be at least 1, not {chunk!r}")
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
    ) -> Tensor:
        """Sum the squared gradients of one batch: float64 (P,)."""
        if self.fisher == "batch":
            return fisher_batch(net, space, x, y, loss=loss, generator=generator, labels=self.labels)
        return fisher_per_sample(net, space, x, y, loss=loss, generator=generator, labels=self.labels, chunk=self.chunk)

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Take the summed observations as they are: a mean would give the same order."""
        if observed is None:
            raise ValueError("the Fisher rules need calibration data: sum observe() over some batches first")
        return observed


class Magnitude(MaskRule):
    """Scores by the absolute pre-trained value (Han et al. 2015 prune by it).

    Args:
        largest: train the coordinates of largest magnitude, or of smallest.

    """

    def __init__(self, largest: bool) -> None:
        self.largest = largest

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Take absolute values."""
        return row.abs()


class Random(MaskRule):
    """Scores uniformly at random: exactly k coordinates, whatever their values."""

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw from [0, 1) in float64, where ties are as good as impossible."""
        return torch.rand(row.shape, generator=generator, device=generator.device, dtype=torch.float64)


class Dense(MaskRule):
    """Everything trains, whatever the ratio."""

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Mark every coordinate."""
        return Mask.of(space, torch.ones(space.size, dtype=torch.bool), rule="Dense", ratio="0.0")


class FromFile(MaskRule):
    """Takes the mask of a file, whatever the ratio; coordinates in ``sparsity.always_train`` train even so.

    Args:
        path: a file that ``Mask.save`` wrote, or any safetensors file of bool tensors under the network's names.

    Raises:
        ValueError: no path.

    """

    def __init__(self, path: str | None) -> None:
        if not path:
            raise ValueError("mask_rule=from_file needs mask_rule.path=<a mask.safetensors file>")
        self.path = path

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Read the file.

        Raises:
            ValueError: no such file, a damaged one, or one made for another model.

        Warns:
            UserWarning: the file freezes coordinates that ``sparsity.always_train`` trains.

        """
        loaded = Mask.load(self.path)
        kept, always = loaded.row(space), space.where(sparsity.always_train)
        if added := int((always & ~kept).sum()):
            text = f"the mask file freezes {added} coordinates that sparsity.always_train trains; they train"
            warnings.warn(text, stacklevel=2)
        return Mask(space.unflatten(kept | always), loaded.metadata | {"rule": "FromFile"})
