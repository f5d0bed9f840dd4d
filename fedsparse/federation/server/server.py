"""The server: global rows, and the ``torch.optim`` optimizer that steps along the mean change as a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice
from fedsparse.core.subspace import CHUNK, Carry, Subspace
from fedsparse.federation.server.aggregation import Change

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
UNTOUCHED = ("step", "hold", "freeze")


class Server:
    """Global rows (G, P) under one optimizer (FedOpt, Reddi et al. 2021, algorithm 2).

    SGD with learning rate 1 is FedAvg. Each group's row is a separate parameter, so that its steps and moments equal
    those of a separate federation.

    Args:
        rows: (G, P) global rows; kept, not copied.
        make_optimizer: builds the optimizer of a list of G parameters (1, n).
        subspace: which n of the P coordinates train; the optimizer has only these.
        untouched: rule for coordinates that no client sent: ``step``, moments move the value; ``hold``, moments decay
            and the value stays; ``freeze``, both stay.

    Attributes:
        values: (G, n) trained values of the rows; the rows themselves if everything trains.
        parameters: G views (1, n) of the values.

    Raises:
        ValueError: an unknown rule.

    """

    def __init__(
        self, rows: Tensor, make_optimizer: MakeOptimizer, subspace: Subspace, untouched: str = "hold"
    ) -> None:
        check_choice("server.untouched", untouched, *UNTOUCHED)
        self.rows, self.subspace, self.untouched = rows, subspace, untouched
        self.values = subspace.of(rows)
        self.parameters = list(self.values.split(1))
        self.optimizer = make_optimizer(self.parameters)

    def broadcast(self, group: Sequence[int]) -> Tensor:
        """Gather the trained values (K, n) that K clients of these groups start from."""
        if len(self.values) == 1:
            return self.values.expand(len(group), -1)
        return self.values[torch.tensor(group, device=self.values.device)]

    @torch.no_grad()
    def move(self, carry: Carry) -> None:
        """Take over another mask: moments are carried over, and are 0 where a coordinate starts to train."""
        if carry.zeros:
            self.rows.masked_fill_(~carry.after.mask, 0.0)
        before = self.parameters
        self.subspace, self.values = carry.after, carry.after.of(self.rows)
        self.parameters = list(self.values.split(1))
        self.optimizer.param_groups[0]["params"] = list(self.parameters)
        for old, new in zip(before, self.parameters, strict=True):
            state = self.optimizer.state.pop(old, {})
            moments = {key: isinstance(t, Tensor) and t.shape == old.shape for key, t in state.items()}
            self.optimizer.state[new] = {key: carry(t) if moments[key] else t for key, t in state.items()}

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Set the trained values (G, n) without a step of the optimizer."""
        self.values.copy_(values)
        if self.values is not self.rows:
            self.subspace.write(self.rows, self.values)

    @torch.no_grad()
    def copy(self, group: int, other: int) -> None:
        """Make a group a copy of another one: its values, and the optimizer's state of them."""
        source, target = self.parameters[other], self.parameters[group]
        target.copy_(source)
        self.optimizer.state.pop(target, None)
        if source in self.optimizer.state:
            state = self.optimizer.state[source].items()
            self.optimizer.state[target] = {k: t.clone() if isinstance(t, Tensor) else t for k, t in state}
        if self.values is not self.rows:
            self.subspace.write(self.rows, self.values)

    @torch.no_grad()
    def step(self, change: Change) -> Change:
        """Take one step of the optimizer along the mean change of every group that received an update.

        Returns:
            The change in the dtype of the rows, which takes the memory of the one given.

        """
        rows, dtype = change.rows, self.values.dtype
        if rows.device.type == "cpu" and rows.is_contiguous() and rows.element_size() > self.values.element_size():
            parts = rows.view(-1).split(CHUNK)  # in place: a chunk that was rounded ends before the next one begins
            rows = rows.view(-1).view(dtype)[: rows.numel()].view(rows.shape)
            for part, place in zip(parts, rows.view(-1).split(CHUNK), strict=True):
                place.copy_(part.to(dtype))
        rows = rows.to(dtype)
        touched = None if self.untouched == "step" else change.touched
        stepped = [group for group, sent in enumerate(change.sent) if sent]
        kept = [] if touched is None else [(group, t, t.clone()) for group in stepped for t in self._kept(group)]
        first = [group for group in stepped if touched is not None and not self._moments(group)]
        for group in stepped:
            self.parameters[group].grad = rows[group : group + 1].neg_()
        self.optimizer.step()
        for group in stepped:
            rows[group].neg_()
            self.parameters[group].grad = None
        for group, tensor, old in kept:
            tensor.copy_(torch.where(touched[group], tensor, old))  # type: ignore[index]
        for group in first if self.untouched == "freeze" else ():
            self._forget(group, touched[group])  # type: ignore[index]
        if self.values is not self.rows:
            self.subspace.write(self.rows, self.values)
        return replace(change, rows=rows)

    def _kept(self, group: int) -> list[Tensor]:
        """Tensors that stay at untouched coordinates: the values, and with ``freeze`` the moments."""
        return [self.parameters[group], *(self._moments(group) if self.untouched == "freeze" else [])]

    def _moments(self, group: int) -> list[Tensor]:
        """List the optimizer's tensors with an entry for each coordinate."""
        parameter = self.parameters[group]
        state = self.optimizer.state.get(parameter, {})
        return [t for t in state.values() if isinstance(t, Tensor) and t.shape == parameter.shape]

    def _forget(self, group: int, touched: Tensor) -> None:
        """Set the moments of untouched coordinates to 0, where they start, after a first step has created them."""
        for moment in self._moments(group):
            moment.mul_(touched)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and what trains of all rows but the first, which is stored as the network's weights.

        What does not train is equal in all rows: the mask stays where there are several.
        """
        rows = self.values[1:].cpu().clone()  # a clone, as a checkpoint would store the whole storage of a view
        return {"optimizer": self.optimizer.state_dict(), "rows": rows}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load optimizer and rows of a checkpoint; the first row is loaded already, with the network.

        Earlier checkpoints hold whole rows (G - 1, P).
        """
        self.optimizer.load_state_dict(state["optimizer"])
        if len(self.rows) > 1:
            rows = state["rows"].to(self.rows.device)
            self.values[1:] = rows if rows.shape[1] == self.subspace.size else self.subspace.of(rows)
            if self.values is not self.rows:
                self.subspace.write(self.rows, self.values)
