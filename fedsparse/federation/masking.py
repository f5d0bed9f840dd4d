"""The mask, chosen while clients train: after an exploration, and anew where the sparsity says so.

Shapes: P coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Coordinates
from fedsparse.masks import Mask, MaskRule, Sparsity

NOTHING = "this mask lets no weight train: lower sparsity.ratio, or let the head train (head.frozen)"


@dataclass
class MaskChoice:
    """What a mask rule knows, and the masks that come of it; every process of a run comes to the same.

    Args:
        rule: scores the coordinates.
        sparsity: how many train, by round.
        space: the coordinates.
        seed: the run's seed.
        mask: what trains now.
        tell: is handed each new mask, and gives it back with its words.
        observed: what calibration or exploration found, (P,), or None.
        memory: what the rule heard in learning rounds, (P,), or None.

    """

    rule: MaskRule
    sparsity: Sparsity
    space: ParamSpace
    seed: int
    mask: Mask
    tell: Callable[[Mask], Mask] = lambda mask: mask
    observed: Tensor | None = None
    memory: Tensor | None = None
    explored: int = 0

    @property
    def prunes(self) -> bool:
        """Whether what does not train is zero."""
        return self.sparsity.mode == "prune"

    def explore(self, found: Tensor) -> None:
        """Take in the mean squared deviation of a round of exploration, (P,); of several rounds the mean counts."""
        self.explored += 1
        fresh = self.observed is None or self.explored == 1
        before = torch.zeros_like(found) if fresh else self.observed.to(found.device)  # type: ignore[union-attr]
        self.observed = before + (found - before) / self.explored

    def hear(self, told: Tensor, trained: Coordinates) -> None:
        """Take in what clients told in a learning round of the coordinates that trained, (n,)."""
        heard = trained.spread(told, self.rule.unheard(told))
        memory = None if self.memory is None else self.memory.to(heard.device)  # of a checkpoint, on the CPU
        self.memory = self.rule.remember(memory, heard)

    def renews(self, round: int) -> bool:
        """Whether a mask is chosen anew before this learning round."""
        return round > 0 and self.sparsity.renews(round)

    def choose(self, row: Tensor, round: int) -> Mask:
        """Choose the mask of a learning round, for global values (P,)."""
        heard = {"memory": _cpu(self.memory)} if self.rule.listens else {}
        again = (round,) if round and self.sparsity.schedule is None else ()  # a schedule thins out one draw
        stream = torch_generator(self.seed, Purpose.MASK, *again)
        sparsity = self.sparsity.at(round)
        mask = self.rule.mask(self.space, row.cpu(), sparsity, observed=_cpu(self.observed), generator=stream, **heard)
        if mask.density == 0:
            raise ValueError(NOTHING)
        self.mask = self.tell(mask)
        return self.mask

    def state_dict(self) -> dict[str, Any]:
        """What the rule knows, if it will be asked again."""
        return {"observed": _cpu(self.observed), "memory": _cpu(self.memory), "explored": self.explored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self.observed, self.memory, self.explored = state["observed"], state["memory"], state["explored"]


def length_of(mask: Mask) -> int:
    """Bytes of a mask as it is sent: none if everything trains."""
    return 0 if mask.density == 1 else len(mask.to_bytes())


def zero(net: nn.Module, space: ParamSpace, mask: Tensor) -> None:
    """Set what does not train to zero: bool (P,)."""
    row = space.read(net)
    space.write(net, row.masked_fill(~mask.to(row.device), 0.0))


def _cpu(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.cpu()
