"""K rows that train together: each tensor of the network is one leaf with K values, a view into the rows.

Shapes: K clients of the cohort, B samples of a step, P coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsparse.core.space import ParamSpace
from fedsparse.core.targets import Weigh
from fedsparse.core.transfer import on_device
from fedsparse.federation.client.bound import Forward, Losses, normalised
from fedsparse.federation.client.whole import gradients, public
from fedsparse.models.stacked import Stacked, stacks
from fedsparse.models.units import trained_units

KEPT = 64  # weights of a step's samples that are kept


class StackedRows:
    """The rows of a cohort of more than one. A tensor without a trained coordinate gets no gradient.

    Layers with a stacked form (``models.stacked``) run all clients at once. A network with other layers, or a user's
    loss, which may depend on a client's whole batch, runs under ``vmap``.

    Args:
        net: the network.
        space: its federated tensors.
        theta: the rows (K, P), with their gradients.
        mask: bool (P,), True where some client trains.
        losses: of every sample of one client's batch: (forward, x, y) -> (B,).
        forward: the network, or its compiled form.
        per_sample: whether each loss depends on its own sample alone, so that the clients' batches may be joined.
        weigh: weights of the samples in a batch's mean; None: all are equal.

    Attributes:
        views: the tensors that the optimizer steps: the rows.
        gradients: of these, after a backward.
        stacked: the stacked form; None under ``vmap``, and before the first batch.
        chosen: whether the form is chosen.

    """

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        theta: Tensor,
        mask: Tensor,
        losses: Losses,
        forward: Forward,
        per_sample: bool,
        weigh: Weigh | None = None,
    ) -> None:
        assert theta.grad is not None
        self.net, self.space, self.losses, self.weigh = net, space, losses, weigh
        self.forward, self.per_sample = forward, per_sample
        self.views, self.gradients = [theta], [theta.grad]
        self.compute = gradients if theta.device.type == "cpu" else public  # a GPU does not wait for Python
        self.leaves = {name: value.detach() for name, value in space.unflatten(theta.detach()).items()}
        trained = [name for name, marks in space.unflatten(mask).items() if bool(marks.any())]
        self.trained = [self.leaves[name].requires_grad_(True) for name in trained]
        self.slots = [space.unflatten(theta.grad)[name] for name in trained]
        self.units = trained_units(net, space.unflatten(mask))
        self.weights: dict[tuple[tuple[int, ...], int], Tensor] = {}
        self.stacked: Stacked | None = None
        self.chosen = False
        self.vmapped = vmap(self._client_losses, in_dims=(0, 0, 0), randomness="different")

    def bind(self) -> None:
        """Do nothing: the network keeps its own weights."""

    def intact(self) -> bool:
        """Whether gradients reach the rows: always, as no gradient is shared with the network."""
        return True

    def release(self) -> None:
        """Do nothing: the network is changed during a forward only."""

    def parts(self, row: Tensor) -> list[Tensor]:
        """View rows (K, P) or (P,) as ``views`` and ``gradients`` are: whole."""
        return [row]

    def backward(self, x: Tensor, y: Tensor, count: Sequence[int], scale: Tensor | None) -> Tensor:
        """Compute the gradient of each client's mean loss over its real samples.

        Args:
            x: inputs (K, B, ...).
            y: labels (K, B), or sequences of targets (K, B, L).
            count: real samples of each client.
            scale: factor of each client's loss (K,), or None.

        Returns:
            The mean losses (K,), not scaled.

        """
        losses = self._sample_losses(x, y)
        weight = self._weights(count, y).to(losses)
        losses = torch.where(weight > 0, losses, 0.0)
        scaled = weight if scale is None else weight * scale.unsqueeze(1)
        torch._foreach_copy_(self.slots, self.compute(losses, self.trained, scaled))
        return (losses.detach() * weight).sum(1)

    def _equal(self, count: Sequence[int], samples: int) -> Tensor:
        """Compute equal weights (K, B) of real samples on the device; those of the last few counts are kept.

        Equal counts are kept for good: a CUDA graph reads their weights where they are.
        """
        key = (tuple(count), samples)
        if key not in self.weights:
            if len(self.weights) >= KEPT:
                self.weights = {(n, b): kept for (n, b), kept in self.weights.items() if len(set(n)) == 1}
            self.weights[key] = on_device(_weights(count, samples), self.views[0].device)
        return self.weights[key]

    def _sample_losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the losses (K, B) of all samples."""
        if not self.chosen:
            self._choose(x[0])
        if self.stacked is not None:
            return self.losses(self.stacked, x.flatten(0, 1), y.flatten(0, 1)).view(y.shape[:2])
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule on a CPU
            return self.vmapped(self.leaves, x, y)

    def _weights(self, count: Sequence[int], y: Tensor) -> Tensor:
        """Compute the weights (K, B) of the samples in each client's mean; 0 of those that are not real."""
        equal = self._equal(count, y.shape[1])
        if self.weigh is None:
            return equal
        return normalised(self.weigh(y.flatten(0, 1)).view(y.shape[:2]) * (equal > 0))

    def _choose(self, x: Tensor) -> None:
        """Choose the stacked form if it gives the same outputs on two samples."""
        self.chosen = True
        if self.per_sample and stacks(self.net, self.space.names, x[:2]):
            self.stacked = Stacked(self.net, self.leaves, self.forward, self.units)

    def _client_losses(self, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Compute the losses (B,) of one client."""
        return self.losses(lambda z: functional_call(self.net, tensors, (z,)), x, y)

    def clear(self) -> None:
        """Do nothing: the next backward overwrites the gradients."""


def _weights(count: Sequence[int], samples: int) -> Tensor:
    """Compute the weights (K, B) of the samples in each client's mean: 1 / count for real samples, else 0."""
    real = torch.tensor(count, dtype=torch.float64).unsqueeze(1)
    return (torch.arange(samples) < real) / real.clamp(min=1)
