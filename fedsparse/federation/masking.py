"""The mask, chosen while clients train: after an exploration, and anew where the sparsity says so.

Shapes: P coordinates of which n train, K clients of the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsparse.core import parallel
from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.core.space import ParamSpace
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.phases import Phases
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change, add_scaled
from fedsparse.federation.watcher import Watcher
from fedsparse.masks import Evidence, Exploration, Mask, MaskRule, Sparsity, Updates, choose

if TYPE_CHECKING:
    from fedsparse.federation.round import Round

NOTHING = "this mask lets no weight train: lower sparsity.ratio, or let the head train (head.frozen)"


class ClientMean:
    """The weighted mean over the clients of a round, in float64: sums that add over cohorts and processes.

    Args:
        size: n.
        device: where the sums are kept.

    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.vector = torch.zeros(size + 2, dtype=torch.float64, device=device)
        self.weight = self.loss = 0.0

    def add(self, rows: Tensor, weight: Sequence[float], loss: Sequence[float]) -> None:
        """Add rows of K clients, (K, n), in client order; one of weight 0 is left out.

        What was too large for the dtype counts as its largest number, so that one client weighs no more than its share.
        """
        for row, w, value in zip(rows, weight, loss, strict=True):
            if w > 0:
                add_scaled(self.vector[:-2], torch.nan_to_num(row), w)
                self.weight, self.loss = self.weight + w, self.loss + w * value

    def finish(self) -> tuple[Tensor, float] | None:
        """Divide by the weights of all processes: the mean (n,) and the mean loss; None without any weight."""
        if parallel.joined():
            self.vector[-2:] = self.vector.new_tensor([self.weight, self.loss])
            torch.distributed.all_reduce(self.vector)
            self.weight, self.loss = self.vector[-2:].tolist()
        if not self.weight:
            return None
        return self.vector[:-2] / self.weight, self.loss / self.weight


@dataclass
class MaskSchedule(Watcher):
    """When masks are chosen, and the evidence that they are chosen by; every process of a run comes to the same.

    Args:
        rule: scores the coordinates.
        sparsity: how many train, by round.
        space: the coordinates.
        seed: the run's seed.
        mask: what trains now.
        report: takes each new mask, and returns it with its metadata.
        observed: what calibration or exploration found, (P,), or None.
        updates: what learning rounds gathered, (P,), or None.
        explored: rounds of exploration that were taken in.
        changes: whether a mask is chosen anew in some learning round.
        mean: of the clients' updates in the round that is open; None where the rule does not score them.

    """

    rule: MaskRule
    sparsity: Sparsity
    space: ParamSpace
    seed: int
    mask: Mask
    report: Callable[[Mask], Mask] = lambda mask: mask
    observed: Tensor | None = None
    updates: Tensor | None = None
    explored: int = 0
    mean: ClientMean | None = None
    changes: bool = field(init=False)

    def __post_init__(self) -> None:
        """Settle whether masks are chosen anew."""
        self.changes = not self.sparsity.constant

    @property
    def prunes(self) -> bool:
        """Whether what does not train is zero."""
        return self.sparsity.mode == "prune"

    @property
    def scores_exploration(self) -> bool:
        """Whether the rule scores what clients explore."""
        return self.rule.need(Exploration) is not None

    @property
    def scores_updates(self) -> bool:
        """Whether the rule scores what clients learn."""
        return self.rule.need(Updates) is not None

    def explore(self, found: Tensor) -> None:
        """Take in the mean squared deviation of a round of exploration, (P,); of several rounds the mean counts."""
        self.explored += 1
        fresh = self.observed is None or self.explored == 1
        before = torch.zeros_like(found) if fresh else self.observed.to(found.device)  # type: ignore[union-attr]
        self.observed = before + (found - before) / self.explored

    def open(self, round: Round) -> None:
        """Begin the mean over this round's updates, if the rule scores them and the phase informs it."""
        informed = self.scores_updates and round.phase.informs_mask and not round.phase.explores
        server = round.federation.server
        self.mean = ClientMean(server.subspace.size, server.rows.device) if informed else None

    def receive(self, round: Round, trained: Update, received: Update) -> None:
        """Add the updates of a cohort."""
        if self.mean is not None:
            rows = self.rule.of_update(received.rows, received.start_values)
            self.mean.add(rows, received.weight, received.loss)

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Take in the mean over all clients, of the coordinates that trained."""
        found, need = None if self.mean is None else self.mean.finish(), self.rule.need(Updates)
        self.mean = None
        if found is not None and need is not None:
            fresh = round.federation.server.subspace.spread(found[0], need.elsewhere(found[0]))
            before = None if self.updates is None else self.updates.to(fresh.device)  # of a checkpoint, on the CPU
            self.updates = need.gather(before, fresh)

    def due(self, number: int, phases: Phases) -> bool:
        """Whether a mask is chosen before a round: the first after an exploration, and where the sparsity says so.

        Before a round, not after the one before: so a checkpoint holds what the choice is made of, and a run that is
        given more rounds makes it too.
        """
        if not self.changes and phases.explore is None:
            return False
        phase, explored = phases.at(number)[0], number > 0 and phases.at(number - 1)[0].explores
        renewed = phase.informs_mask and self.renews(phases.of_kind(number))
        return not phase.explores and (explored or renewed)

    def renews(self, round: int) -> bool:
        """Whether a mask is chosen anew before this learning round."""
        return round > 0 and self.sparsity.renews(round)

    def choose(self, row: Tensor, round: int) -> Mask:
        """Choose the mask of a learning round, for global values (P,)."""
        again = (round,) if round and self.sparsity.schedule is None else ()  # a schedule thins out one draw
        stream = torch_generator(self.seed, Purpose.MASK, *again)
        observed, updates = _cpu(self.observed), _cpu(self.updates)
        evidence = Evidence(self.space, row.cpu(), self.sparsity.at(round), stream, observed, updates)
        mask = choose(self.rule, evidence)
        if mask.density == 0:
            raise ValueError(NOTHING)
        self.mask = self.report(mask)
        return self.mask

    def state_dict(self) -> dict[str, Any]:
        """The evidence, for a choice after a resume; the names are those of every version."""
        return {"observed": _cpu(self.observed), "memory": _cpu(self.updates), "explored": self.explored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self.observed, self.updates, self.explored = state["observed"], state["memory"], state["explored"]


def zero(net: nn.Module, space: ParamSpace, mask: Tensor) -> None:
    """Set what does not train to zero: bool (P,)."""
    row = space.read(net)
    space.write(net, row.masked_fill(~mask.to(row.device), 0.0))


def _cpu(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.cpu()
