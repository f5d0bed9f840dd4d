"""A copy of the network for evaluation between the cohorts of a round, while the network is bound to a client's row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Split
from fedsparse.models.copies import copied
from fedsparse.simulation.module import ClientModule


@dataclass(frozen=True)
class Batches:
    """How samples are evaluated.

    Attributes:
        size: samples of a batch.
        precision: context of a forward.

    """

    size: int
    precision: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(cls, trainer: lightning.Trainer) -> Batches:
        """Take a trainer's: the size of its data module, and the precision of a validation."""
        return cls(trainer.datamodule.eval_batch_size, trainer.precision_plugin.val_step_context)  # type: ignore[attr-defined]


class CopiedNet:
    """A copy of the network, in evaluation mode and without gradients.

    Args:
        net: the network, before its parameters become views of a row.

    """

    def __init__(self, net: nn.Module) -> None:
        self.net = copied(net).eval().requires_grad_(False)
        self.buffers = ParamSpace.of_buffers(self.net)

    @torch.no_grad()
    def load(self, module: ClientModule, row: Tensor | None = None, buffers: Tensor | None = None) -> None:
        """Copy the network's parameters and buffers, and replace those of a row (P,) and of buffer values if given."""
        for target, source in zip(_values(self.net), _values(module.net), strict=True):
            target.copy_(source)
        if row is not None:
            module.space.write(self.net, row)
        if buffers is not None:
            self.buffers.write(self.net, buffers)

    @torch.no_grad()
    def outputs(
        self, trainer: lightning.Trainer, module: ClientModule, samples: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate the copy on samples of the test split, in the precision of a validation.

        Args:
            trainer: its data module has the split.
            module: transforms the inputs and computes the losses.
            samples: indices of the split, int64 (N,).

        Returns:
            Logits (N, classes), labels (N,) and losses (N,), on the CPU.

        """
        test = trainer.datamodule.dataset.test  # type: ignore[attr-defined]
        batches = [
            (_single(logits), y.cpu(), _single(module.losses(lambda _: logits, x, y)))  # noqa: B023  (called at once)
            for logits, x, y in self._batches(Batches.of(trainer), module, test, samples)
        ]
        logits, labels, losses = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return logits, labels, losses

    @torch.no_grad()
    def scores(self, how: Batches, module: ClientModule, split: Split, samples: Tensor) -> dict[str, Tensor]:
        """Evaluate the copy on samples of a split, as ``outputs``, without keeping logits.

        Args:
            how: size and precision of the batches.
            module: transforms the inputs and computes the losses.
            split: the samples.
            samples: indices of the split, int64 (N,).

        Returns:
            What ``ClientModule.scores`` returns of all samples, on the CPU.

        """
        batches = [module.scores(*batch) for batch in self._batches(how, module, split, samples)]
        return {key: torch.cat([_single(scores[key]) for scores in batches]) for key in batches[0]}

    def _batches(
        self, how: Batches, module: ClientModule, split: Split, samples: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield logits, inputs and targets of each batch, in the precision of a validation."""
        for batch in samples.split(how.size):
            x, y = split.x[batch].to(module.device), split.y[batch].to(module.device)
            with how.precision():
                yield self.net(module.inputs(x)), x, y


def _single(values: Tensor) -> Tensor:
    """Move values to the CPU, floats in float32 or wider."""
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else None)


def _values(net: nn.Module) -> list[Tensor]:
    """List parameters and buffers."""
    return [*net.parameters(), *net.buffers()]
