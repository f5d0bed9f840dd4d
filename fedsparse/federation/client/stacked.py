"""K rows that train together: each tensor's K values are one leaf, a view of the rows.

Shapes: K clients of the cohort, B samples of a step, P coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsparse.core.space import ParamSpace
from fedsparse.federation.client.bound import Forward, Losses
from fedsparse.models.stacked import Stacked, stacks
from fedsparse.models.units import trained_units


class StackedRows:
    """The rows of a cohort of more than one. A tensor without a trained coordinate takes no gradient.

    Layers with a stacked form (``models.stacked``) run all clients at once; a network that has others, or a loss of
    one's own, which may look at a client's whole batch, runs under ``vmap``.

    Args:
        net: the network.
        space: its federated tensors.
        theta: the rows (K, P), with their gradients.
        mask: bool (P,), what some client trains.
        losses: of every sample of one client's batch: (forward, x, y) -> (B,).
        forward: calls the network; the network itself, or compiled.
        per_sample: whether each loss depends on its own sample alone, so that the clients' batches may be joined.

    Attributes:
        views: what the optimizer steps.
        gradients: of these, after a backward.

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
    ) -> None:
        assert theta.grad is not None
        self.net, self.space, self.losses = net, space, losses
        self.forward, self.per_sample = forward, per_sample
        self.views, self.gradients = [theta], [theta.grad]
        self.leaves = {name: value.detach() for name, value in space.unflatten(theta.detach()).items()}
        trained = [name for name, marks in space.unflatten(mask).items() if bool(marks.any())]
        self.trained = [self.leaves[name].requires_grad_(True) for name in trained]
        self.slots = [space.unflatten(theta.grad)[name] for name in trained]
        self.units = trained_units(net, space.unflatten(mask))
        self.stacked: Stacked | None = None
        self.chosen = False
        self.vmapped = vmap(self._client_losses, in_dims=(0, 0, 0), randomness="different")

    def bind(self) -> None:
        """Nothing to do: the network keeps its own weights."""

    def intact(self) -> bool:
        """Whether gradients still reach the rows; nothing that Lightning clears is shared with the network."""
        return True

    def release(self) -> None:
        """Nothing to do: the network is changed during a forward only."""

    def parts(self, row: Tensor) -> list[Tensor]:
        """View rows (K, P) or (P,) as ``views`` and ``gradients`` are: whole."""
        return [row]

    def backward(self, x: Tensor, y: Tensor, count: Sequence[int], scale: Tensor | None) -> Tensor:
        """Compute the gradient of each client's mean loss over its real samples.

        Args:
            x: inputs (K, B, ...).
            y: labels (K, B).
            count: real samples of each client.
            scale: factor of each client's loss (K,), or None.

        Returns:
            The mean losses (K,), not scaled.

        """
        losses = self._sample_losses(x, y)
        weight = _weights(count, y.shape[1]).to(losses)
        losses = torch.where(weight > 0, losses, 0.0)
        scaled = weight if scale is None else weight * scale.unsqueeze(1)
        torch._foreach_copy_(self.slots, torch.autograd.grad(losses, self.trained, scaled, materialize_grads=True))
        return (losses.detach() * weight).sum(1)

    def _sample_losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Losses of all samples (K, B)."""
        if not self.chosen:
            self._choose(x[0])
        if self.stacked is not None:
            return self.losses(self.stacked, x.flatten(0, 1), y.flatten()).view(y.shape)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule on a CPU
            return self.vmapped(self.leaves, x, y)

    def _choose(self, x: Tensor) -> None:
        """Choose the stacked form if it is known to give the same outputs, tried on a few samples."""
        self.chosen = True
        if self.per_sample and stacks(self.net, self.space.names, x[:2]):
            self.stacked = Stacked(self.net, self.leaves, self.forward, self.units)

    def _client_losses(self, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Losses (B,) of one client."""
        return self.losses(lambda z: functional_call(self.net, tensors, (z,)), x, y)

    def clear(self) -> None:
        """Nothing to do: the next backward writes over the gradients."""


def _weights(count: Sequence[int], samples: int) -> Tensor:
    """Weight of each of B samples in its client's mean, (K, B): 1 / count for the real ones, else 0."""
    real = torch.tensor(count, dtype=torch.float64).unsqueeze(1)
    return (torch.arange(samples) < real) / real.clamp(min=1)
