"""Policies for a network's float buffers (BatchNorm's running statistics): averaged, kept by the client, or frozen.

Without one, a client's statistics leak into the next client. Shapes: K clients, G groups, Q values that travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsparse.core.checks import check_choice
from fedsparse.core.space import ParamSpace
from fedsparse.federation.stores.store import ClientStore, Kept, MemoryStore

BUFFERS = "client_buffers"  # the store's name
POLICIES = ("average", "local", "frozen")


class Buffers:
    """Float buffers of the network, for a cohort of one.

    Args:
        net: the network; its buffers are the global ones.
        policy: ``average`` sends their change with the update and averages it with the same weights; ``local`` keeps
            them with each client; ``frozen`` keeps the pre-trained values.
        store: where ``local`` keeps them; in memory by default.

    Attributes:
        values: (G, *) global values of all float buffers.
        size: Q; 0 unless the policy is ``average``.

    Raises:
        ValueError: an unknown policy.

    """

    def __init__(self, net: nn.Module, policy: str = "average", store: ClientStore | None = None) -> None:
        check_choice("federation.buffers", policy, *POLICIES)
        self.net, self.policy, self.space = net, policy, ParamSpace.of_buffers(net)
        self.store: ClientStore = MemoryStore() if store is None else store
        self.values = self.space.read(net).to(next(net.parameters()).device).unsqueeze(0)
        self.size = self.space.size if policy == "average" else 0
        self.integers = integers(net)

    def spread(self, groups: int) -> None:
        """Repeat the global values for so many global models, which start equal."""
        self.values = self.values[:1].repeat(groups, 1)

    def of(self, client: int, group: int) -> Tensor:
        """Values of all float buffers that a client starts from: its group's global ones, or its stored ones."""
        return self.store.get(client, self.values[group]) if self.policy == "local" else self.values[group]

    def start(self, clients: Sequence[int], groups: Sequence[int]) -> None:
        """Load the values that the one client starts from into the network."""
        self.space.write(self.net, self.of(clients[0], groups[0]))
        if self.policy == "frozen":
            freeze(self.net)

    def change(self, groups: Sequence[int]) -> Tensor:
        """Compute the change (K, Q) of the buffers that travel, of K clients of these groups."""
        return (self.space.read(self.net) - self.values[groups[0]]).expand(len(groups), -1)  # K > 1: no change

    def kept(self, clients: Sequence[int]) -> Kept:
        """Read the values that the client that has just trained stores; empty unless the policy is ``local``."""
        if self.policy != "local":
            return {}
        return {BUFFERS: (tuple(clients), self.space.read(self.net).unsqueeze(0).cpu())}

    def hand_on(self, group: int) -> None:
        """Make the buffers of the client that has just trained the global ones, from which the next client starts."""
        if self.size:
            self.values[group] = self.space.read(self.net)

    def copy(self, group: int, other: int) -> None:
        """Copy the global values of another group."""
        self.values[group] = self.values[other]

    def step(self, change: Tensor, sent: Sequence[bool]) -> None:
        """Add the mean change (G, Q) to the groups that received an update.

        Raises:
            ValueError: an integer buffer other than a batch counter changed: it cannot be averaged.

        """
        if self.integers:
            check_integers(self.net, self.integers)
        for group in range(len(sent)) if self.size else ():
            if sent[group]:
                self.values[group] += change[group].to(self.values.dtype)

    def show(self, group: int = 0) -> None:
        """Load the global values of a group into the network."""
        self.space.write(self.net, self.values[group])


def integers(net: nn.Module) -> dict[str, Tensor]:
    """Copy the integer buffers, which must not change; BatchNorm's batch counter may, and stays local."""
    named = [(n, b) for n, b in net.named_buffers() if not n.endswith("num_batches_tracked")]
    return {name: buffer.clone() for name, buffer in named if not buffer.is_floating_point()}


def check_integers(net: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Compare the integer buffers with earlier copies.

    Raises:
        ValueError: one has changed: it cannot be averaged.

    """
    changed = [name for name, buffer in net.named_buffers() if name in before and not buffer.equal(before[name])]
    if changed:
        raise ValueError(f"the integer buffers {', '.join(changed)} change in training and cannot be averaged")


def freeze(net: nn.Module) -> None:
    """Set BatchNorm layers to evaluation mode, which uses the running statistics and does not update them."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
