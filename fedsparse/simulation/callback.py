"""The rounds of a federation as a Lightning callback: an epoch is a round, a batch is a cohort."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning

from fedsparse.data.rounds import Cohort
from fedsparse.federation.client.training import Clients
from fedsparse.federation.federation import Federation
from fedsparse.federation.phases import Phase
from fedsparse.federation.round import Round
from fedsparse.simulation.module import ClientModule


class FederatedRounds(lightning.Callback):
    """Plays the rounds: sends to each cohort before it trains, and takes in what it sends back.

    The round closes in the last ``on_train_batch_end``, so that Lightning validates the new global model. A fit is one
    federation: what lasts over rounds goes on from a checkpoint (``ckpt_path``), and a second fit begins anew.

    Args:
        federate: makes the federation of the clients, once the network is on its device; such as
            ``partial(Federation, exchange=..., aggregation=WeightedMean(), topology=Flat())``.

    Attributes:
        federation: from the start of the training.
        round: the one that is open, or None.
        phase: of the open round, or the last one.
        number_in_phase: of that round, from 0.
        lr: the clients' learning rate of that round.
        loss: their mean loss in the last closed round.

    """

    federation: Federation

    def __init__(self, federate: Callable[[Clients], Federation]) -> None:
        self.federate = federate
        self.loaded: dict[str, Any] | None = None
        self.round: Round | None = None
        self.phase, self.number_in_phase = Phase("learn"), 0
        self.loss = self.lr = math.nan

    def on_fit_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Make the federation, and go on from a checkpoint, if all rounds are closed there too."""
        self.federation = self.federate(module.clients)
        if self.loaded is not None:
            self.federation.load_state_dict(self.loaded)
            self.loaded = None
        module.evaluate(self.federation.topology.groups, self.federation.show)

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Open the round."""
        trained = self.federation.server.subspace
        self.round = self.federation.open(trainer.current_epoch)
        self.phase, self.number_in_phase = self.federation.phases.at(trainer.current_epoch)
        self.lr = self.round.lr
        if self.federation.server.subspace is not trained:
            module.set_mask(self.federation.server.subspace.mask)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, batch: Cohort, batch_idx: int
    ) -> None:
        """Send the global values to the cohort."""
        assert self.round is not None
        module.receive(self.round.send(batch))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, outputs: Any, batch: Cohort, batch_idx: int
    ) -> None:
        """Take the cohort's update in, and close the round after the last one."""
        assert self.round is not None
        if batch.members:
            self.round.receive(batch, self.round.encode(outputs["update"]))
        if trainer.is_last_batch:
            self.loss = self.round.close()
            self.round = None  # before the next one takes memory for its own sums

    def group(self, clients: Sequence[int]) -> Sequence[int]:
        """Find the global model of each of some clients; nothing where all share one."""
        topology = self.federation.topology
        return topology.group(clients) if topology.groups > 1 else ()

    def state_dict(self) -> dict[str, Any]:
        """What lasts over rounds and is not the network's."""
        return self.federation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state, for when training starts."""
        self.loaded = state

    def saved(self) -> None:
        """Be told that a checkpoint to resume from is whole on the disk."""
        self.federation.saved()
