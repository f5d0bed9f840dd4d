"""A round of exploration: the mask rule scores the clients' squared deviations. Shapes: K clients, n coordinates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsparse.data.rounds import Cohort
from fedsparse.federation.exchange.update import Payload, Start, Update, counted
from fedsparse.federation.exchange.wire.message import known_size
from fedsparse.federation.masking import ClientMean
from fedsparse.federation.phases import Phase
from fedsparse.federation.reports import Report
from fedsparse.federation.round import Round
from fedsparse.federation.server.aggregation import Change

if TYPE_CHECKING:
    from fedsparse.federation.federation import Federation


class Explore(Round):
    """A round whose clients start from the same row and send the squares of their changes (AutoFLIP).

    If the phase updates the model, each client starts where the previous one stopped, and sends the model too.

    Attributes:
        deviation: weighted sum of the squared changes (n,).
        chain: values (1, n) where the last client stopped; None before the first, or if the model is not updated.

    """

    def __init__(self, federation: Federation, number: int, phase: Phase, lr: float) -> None:
        super().__init__(federation, number, phase, lr)
        self.deviation = ClientMean(federation.server.subspace.size, federation.server.rows.device)
        self.chain: Tensor | None = None

    def send(self, cohort: Cohort) -> Start:
        """Give K clients their start: the global values, or those where the previous client stopped."""
        start, local = super().send(cohort), self.federation.clients.local
        if self.chain is None:
            return start
        values = self.chain.expand(len(cohort.clients), -1)
        restored = values if local is None else self.federation.restored(cohort.clients, values, local)
        return replace(start, values=restored)

    def encode(self, update: Update) -> Payload:
        """Count the bytes of squared deviations, if the mask rule scores them, and of the model, if it is updated."""
        f = self.federation
        informs = f.choice is not None and f.choice.scores_exploration and self.phase.informs_mask
        n, dtype = f.exchange.size, update.rows.dtype
        size = known_size(n, 0, dtype) * informs + known_size(n, f.buffers.size, dtype) * self.phase.updates_model
        return Payload(update, (size,) * len(update.clients))

    def receive(self, cohort: Cohort, payload: Payload) -> None:
        """Add the squared deviations, and keep the model for the next client; clients store nothing."""
        update, group = payload.update, self.federation.topology.group(cohort.clients)
        self.deviation.add(update.rows.square(), update.weight, update.loss)
        if self.phase.updates_model and counted(update):
            assert update.values is not None
            self.chain = update.values[:1].clone()
            self.federation.buffers.hand_on(group[0])
        self.reports.append(Report.of(self.number, update, group, payload.sizes, {}))

    def _step(self) -> Change | None:
        """Give the mask rule the mean squared deviation, and the server the last client's values; None without updates.

        The server's optimizer takes no step: its row stays, or is replaced.
        """
        f, found = self.federation, self.deviation.finish()
        if found is None:
            return None
        if f.choice is not None and f.choice.scores_exploration and self.phase.informs_mask:
            f.choice.explore(f.server.subspace.spread(found[0]))
        if self.chain is not None:
            f.server.put(self.chain)
        nothing = torch.zeros(f.topology.groups, 0)
        return Change(nothing, nothing, None, found[1], (True,) * f.topology.groups)
