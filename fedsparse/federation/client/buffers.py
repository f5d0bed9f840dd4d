"""What becomes of a network's float buffers (BatchNorm's running statistics): averaged, kept by the client, or frozen.

Ignoring them lets one client's statistics leak into the next. Q is the number of their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsparse.core.space import ParamSpace
from fedsparse.federation.stores.store import ClientStore, MemoryStore

POLICIES = ("average", "local", "frozen")


class Buffers:
    """Float buffers of the network of a cohort of one.

    Args:
        policy: ``average`` sends their change with the update and averages it with the same weights; ``local`` keeps
            them with each client; ``frozen`` leaves them as they were pre-trained.
        store: where ``local`` keeps them; in memory by default.

    Raises:
        ValueError: an unknown policy.

    """

    def __init__(self, policy: str = "average", store: ClientStore | None = None) -> None:
        if policy not in POLICIES:
            raise ValueError(f"federation.buffers is {policy!r}; it must be one of {', '.join(POLICIES)}")
        self.policy = policy
        self.store: ClientStore = MemoryStore() if store is None else store
        self.space = ParamSpace((), ())
        self.row = torch.zeros(0)

    @property
    def size(self) -> int:
        """Q, values that travel."""
        return self.row.numel()

    def open(self, net: nn.Module) -> None:
        """Take the network's buffers as the global ones; called when training starts or goes on."""
        self.net, self.every = net, ParamSpace.of_buffers(net)
        self.start = self.every.read(net)
        self.integers = integers(net)
        self.space = self.every if self.policy == "average" else ParamSpace((), ())
        self.row = self.space.read(net).to(next(net.parameters()).device)

    def send(self, clients: Sequence[int]) -> None:
        """Give a client the global buffers, or its own."""
        if not self.every.size:
            return
        kept = self.store.get(clients[0], self.start) if self.policy == "local" else self.start
        self.every.write(self.net, kept)
        if self.policy == "frozen":
            freeze(self.net)

    def take(self, clients: int) -> Tensor:
        """Change (K, Q) of the buffers that travel, for so many clients."""
        if not self.space.size:
            return self.row.expand(clients, 0)
        return (self.space.read(self.net) - self.row).expand(clients, -1)  # stacked clients change none

    def kept(self) -> Tensor | None:
        """What the client that has just trained keeps (1, values), or None."""
        local = self.policy == "local" and self.every.size
        return self.every.read(self.net).unsqueeze(0).cpu() if local else None

    def hand_on(self) -> None:
        """Let the next client, and the global model, have the buffers of the one that has just trained."""
        if self.every.size and self.policy == "average":
            self.row = self.start = self.every.read(self.net)

    def close(self, change: Tensor) -> None:
        """Add the mean change (G, Q) and put the global buffers into the network.

        Raises:
            ValueError: an integer buffer other than a batch counter changed: it cannot be averaged.

        """
        check_integers(self.net, self.integers)
        if self.space.size:
            self.row = self.start = self.row + change[0].to(self.row.dtype)
        self.stay()

    def stay(self) -> None:
        """Put the global buffers into the network as they are: adding a change of 0 would turn -0.0 into 0.0."""
        self.every.write(self.net, self.start)


def integers(net: nn.Module) -> dict[str, Tensor]:
    """Copy the integer buffers, which must not change; BatchNorm's batch counter may, and stays local."""
    named = [(n, b) for n, b in net.named_buffers() if not n.endswith("num_batches_tracked")]
    return {name: buffer.clone() for name, buffer in named if not buffer.is_floating_point()}


def check_integers(net: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Compare the integer buffers with those of before.

    Raises:
        ValueError: one has changed: it cannot be averaged.

    """
    changed = [name for name, buffer in net.named_buffers() if name in before and not buffer.equal(before[name])]
    if changed:
        raise ValueError(f"the integer buffers {', '.join(changed)} change in training and cannot be averaged")


def freeze(net: nn.Module) -> None:
    """Let BatchNorm compute with its statistics as they are."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
