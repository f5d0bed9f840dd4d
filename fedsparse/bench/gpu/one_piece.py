"""A prototype of K = 1: the whole row is one piece for the optimizer, and autograd returns its gradients.

Today a large tensor is a piece of its own, whose gradient autograd makes anew; that suits a CPU's cache, and costs a
GPU some launches a tensor. Here one call copies all gradients into the row's, and the optimizer takes one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsparse.data.rounds import Cohort
from fedsparse.federation.client.bound import Bound, BoundRow
from fedsparse.federation.client.training import Batch, Clients, no_samples
from fedsparse.optim.index import Block
from fedsparse.simulation.module import ClientModule


class OnePieceRow(BoundRow):
    """A row whose gradients are copied in after each backward, and so need no zeros before it."""

    def _bound(self) -> Bound:
        """Bind the network, and find what a backward computes and where it is copied to."""
        bound = super()._bound()
        trained = [name for name in self.space.names if name in self.trained]
        views = self.space.unflatten(self.grad)
        self.leaves = [self.net.get_parameter(name) for name in trained]
        self.slots = [views[name] for name in trained]
        return bound

    def backward(self, x: Tensor, y: Tensor, count: Sequence[int], scale: Tensor | None) -> Tensor:
        """Compute the gradient of the mean loss over the real samples, as ``BoundRow`` does."""
        real = count[0]
        losses = self.losses(self.forward, x[:real], y[:real])
        weight = losses.new_full((real,), 1 / real)
        weight = weight if scale is None else weight * scale
        torch._foreach_copy_(self.slots, torch.autograd.grad(losses, self.leaves, weight, materialize_grads=True))
        self.gradients = [self.grad]
        return losses.detach().mean()

    def clear(self) -> None:
        """Keep the gradients: the next backward writes over them."""


class OnePieceClients(Clients):
    """Clients that train one after the other, each in a row of one piece."""

    def _single(self, mask: Tensor) -> tuple[OnePieceRow, list[Tensor | None]]:
        whole = Block("", 0, (self.space.size,), None if bool(mask.all()) else mask)
        row = OnePieceRow(self.net, self.space, self.theta, mask, [whole], self.losses, self.forward)
        return row, [whole.mask]


class OnePieceModule(ClientModule):
    """Forms such clients; of what ``ClientModule`` takes, only what the check uses."""

    def form(self, fetch: Callable[[Cohort], Batch] = no_samples, loss_scale: float = 1.0) -> Clients:
        """Form the clients, with the network where it lies."""
        mask = torch.as_tensor(self.mask).clone()
        inputs, make = self.inputs, self.make_optimizer
        return OnePieceClients(self.net, self.space, mask, make, self.losses, fetch, inputs=inputs)
