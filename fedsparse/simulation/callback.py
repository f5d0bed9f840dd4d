"""The rounds of a federation as a Lightning callback: an epoch is a round, a batch is a bundle of cohorts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning

from fedsparse.data.rounds import Bundle
from fedsparse.federation.client.training import Clients
from fedsparse.federation.federation import Federation
from fedsparse.federation.phases import Phase
from fedsparse.federation.round import Round, TakePart, take_part
from fedsparse.simulation.module import ClientModule


class FederatedRounds(lightning.Callback):
    """Opens a round for the module, which trains its cohorts, and closes it.

    The round closes in the last ``on_train_batch_end``, so that Lightning validates the new global model. Each fit has
    a new federation, whose state is loaded from a checkpoint if there is one (``ckpt_path``).

    Args:
        federate: builds the federation of the clients, once the network is on its device; such as
            ``partial(Federation, exchange=..., aggregation=WeightedMean(), topology=Flat())``.
        take_part: trains cohorts in an open round: in this process, or elsewhere.

    Attributes:
        federation: exists from the start of the fit.
        loaded: state of a checkpoint, until the fit starts.
        round: the open one, or None.
        phase: of the open round, or the last one.
        number_in_phase: of that round, from 0.
        lr: the clients' learning rate of that round.
        loss: their mean loss in the last closed round.
        began: when that round opened, in seconds.
        cohorts: that have trained in it.

    """

    federation: Federation

    def __init__(self, federate: Callable[[Clients], Federation], take_part: TakePart = take_part) -> None:
        self.federate, self.take_part = federate, take_part
        self.loaded: dict[str, Any] | None = None
        self.round: Round | None = None
        self.phase, self.number_in_phase = Phase("learn"), 0
        self.loss = self.lr = math.nan
        self.began, self.cohorts = 0.0, 0

    def on_fit_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Build the federation, and load the state of a checkpoint into it."""
        self.federation = self.federate(module.clients)
        if self.loaded is not None:
            self.federation.load_state_dict(self.loaded)
            self.loaded = None
        module.evaluate(self.federation.topology.groups, self.federation.show)

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Open the round, and pass a changed mask to the module."""
        trained = self.federation.server.subspace
        self.round = self.federation.open(trainer.current_epoch)
        self.phase, self.number_in_phase = self.federation.phases.at(trainer.current_epoch)
        self.lr, self.began, self.cohorts = self.round.lr, time.perf_counter(), 0
        module.join(self.round, self.take_part)
        if self.federation.server.subspace is not trained:
            module.set_mask(self.federation.server.subspace.mask)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, outputs: Any, batch: Bundle, batch_idx: int
    ) -> None:
        """Close the round after the last cohort."""
        assert self.round is not None
        self.cohorts += len(batch.cohorts)
        if trainer.is_last_batch:
            trainer.datamodule.paced((time.perf_counter() - self.began) / self.cohorts)  # type: ignore[attr-defined]
            self.loss = self.round.close()
            self.round = None  # frees its sums before the next round allocates its own

    def group(self, clients: Sequence[int]) -> Sequence[int]:
        """Map clients to the index of their global model; empty if all share one."""
        topology = self.federation.topology
        return topology.group(clients) if topology.groups > 1 else ()

    def state_dict(self) -> dict[str, Any]:
        """The federation's state, without the network's weights."""
        return self.federation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit starts."""
        self.loaded = state

    def saved(self) -> None:
        """Release what only older checkpoints needed, once a new one is on disk."""
        self.federation.saved()
