"""The protocol of one round, and only that.

Shapes: G global rows, K clients of the cohort, n coordinates that train, Q float-buffer values. What does not train is
not touched: it stays in the network and in the rows of clients and server as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import Tensor

from fedsparse.core import parallel
from fedsparse.core.seeding import Purpose, number
from fedsparse.core.subspace import Coordinates, Move
from fedsparse.data.rounds import Cohort
from fedsparse.federation.client.buffers import Buffers
from fedsparse.federation.exchange.admission import counted, finite, finite_rows, of_those
from fedsparse.federation.exchange.downlink import Downlink
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.exchange.traffic import Traffic
from fedsparse.federation.exchange.update import Payload, Update
from fedsparse.federation.exchange.wire.message import HEADER, Size, known_size
from fedsparse.federation.guide import Guide
from fedsparse.federation.masking import MaskChoice, length_of
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.reports import Diverged, Dropped, EveryUpdateDropped, Report, named
from fedsparse.federation.schedule import Schedule, constant
from fedsparse.federation.server.aggregation import Aggregation, FedNova
from fedsparse.federation.server.topology import Topology
from fedsparse.federation.stores.store import ClientStore, Kept, MemoryStore, read
from fedsparse.simulation.module import ClientModule

log = logging.getLogger("fedsparse")
LOCAL, BUFFERS = "clients", "client_buffers"  # names of stores; those of filters and objectives come to them
NOTHING = Size(0, 0, 0)


@dataclass
class FederatedRounds(lightning.Callback):
    """Sends the global row out before a cohort trains and takes its update in afterwards.

    An epoch is a round and a batch is a cohort. The round closes in the last ``on_train_batch_end``, so that Lightning
    validates the new global model.

    Args:
        exchange: what is sent.
        aggregation: how updates become one change.
        topology: which global row each client starts from.
        buffers: what becomes of float buffers.
        ledger: counts bytes.
        store: what clients keep of the row between rounds.
        schedule: factor of the clients' learning rate by round, from (round, rounds).
        seed: the run's seed, for dropout.
        model_length: bytes of the first model.
        mask_length: bytes of the mask.
        traffic: what each client of each round sent and received.
        phases: of the run; None: all rounds are learning rounds.
        choice: chooses the mask while clients train; None: it stays.

    """

    exchange: Exchange
    aggregation: Aggregation
    topology: Topology
    buffers: Buffers = field(default_factory=Buffers)
    ledger: Ledger = field(default_factory=Ledger)
    store: ClientStore = field(default_factory=MemoryStore)
    schedule: Schedule = constant
    seed: int = 0
    model_length: int = 0
    mask_length: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    phases: Phases | None = None
    choice: MaskChoice | None = None
    downlink: Downlink = field(default_factory=Downlink)
    dropped: list[Dropped] = field(default_factory=list)
    stores: dict[str, ClientStore] = field(default_factory=dict)
    loaded: dict[str, Any] | None = None
    loss: float = math.nan
    lr: float = math.nan

    def on_train_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Prepare what lasts over rounds: local coordinates and the base learning rate."""
        self.phases = self.phases or Phases([Phase("learn", rounds=int(trainer.max_epochs or 1))])
        self.round = trainer.current_epoch - 1
        self._see_trained(module)
        self.exchange.follow(torch.as_tensor(module.mask))  # on the device that the updates will lie on
        self.change: Tensor | None = None
        self.base_lr = [group["initial_lr"] for group in _with_initial_lr(module.local)]
        self.dense = HEADER.size + module.server.rows[0].nbytes
        self.buffers.open(module.net)
        self.objective = module.objective
        self.stores = {LOCAL: self.store, BUFFERS: self.buffers.store}
        self.stores |= self.exchange.stores() | self.objective.stores
        self.weighs_steps = self.objective.messages > 0 or isinstance(self.aggregation, FedNova)
        self._resume()

    def _see_trained(self, module: ClientModule) -> None:
        """Note which of the coordinates that train stay with the clients."""
        self.local = module.trained.of(module.space.local.to(module.device))
        self.keeps_local = bool(self.local.any())
        self.travels = ~self.local
        pruned = self.choice is not None and self.choice.prunes
        self.zeros = pruned * (module.trained.total - module.trained.size) * module.theta.element_size()

    def _resume(self) -> None:
        """Give objective, mask rule and stores what a checkpoint holds for them."""
        if self.loaded is None:
            return
        if self.phases is not None:
            self.phases.check(self.loaded["phases"])
        if self.choice is not None:
            self.choice.load_state_dict(self.loaded["choice"])
        self.objective.load_state_dict(self.loaded["objective"])
        for name, store in self.stores.items():
            store.load_state_dict(self.loaded["stores"][name])
        self.loaded = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Open the round: its phase, empty sums, and the clients' learning rate."""
        self.round = trainer.current_epoch
        assert self.phases is not None
        self.phase, self.own = self.phases.at(self.round)
        self._choose(trainer, module)
        groups, size = module.server.values.shape
        heard, learned = size * (self.phase.explores or self._listens()), size * (not self.phase.explores)
        self.tally = self.aggregation.zero(groups, learned, self.buffers.size, module.device, self.exchange.own)
        self.guide = Guide(heard, module.device)
        self.chain: Tensor | None = None
        self.reports: list[Report] = []
        self.arrived: list[int] = []
        self.row = self._travelling(module)
        module.patience, module.epochs = self.phase.patience, self.phase.local_epochs or 1
        module.explores = self.phase.explores
        self._set_rate(module)

    def _set_rate(self, module: ClientModule) -> None:
        """Set the clients' learning rate: the phase's own, or that of the schedule."""
        factor = 1.0 if self.phase.explores else self.schedule(self.own, self.phase.rounds)
        for group, lr in zip(module.local.param_groups, self.base_lr, strict=True):
            group["lr"] = self.lr = lr * factor if self.phase.lr is None else self.phase.lr

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, batch: Cohort, batch_idx: int
    ) -> None:
        """Send the global values to the cohort."""
        self.group = self.topology.group(batch.clients)
        self.begin = self._with_local(batch.clients, self._start(module))
        module.start(self.begin, module.own_masks(batch.clients), batch.clients)
        self.buffers.send(batch.clients)
        if batch.members:
            seed_dropout(module.device, number(self.seed, Purpose.DROPOUT, batch.round, batch.clients[0]))

    def _start(self, module: ClientModule) -> Tensor:
        """Values (K, n) that the cohort starts from: the global ones, or those that the client before has left."""
        values = module.server.broadcast(self.group)
        return values if self.chain is None else self.chain.expand_as(values)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, outputs: Any, batch: Cohort, batch_idx: int
    ) -> None:
        """Take the cohort's update in, and close the round after the last one."""
        if batch.members:
            self._take(module, batch)
        if trainer.is_last_batch:
            self._close(module)

    def _take(self, module: ClientModule, cohort: Cohort) -> None:
        """Take a cohort's update in."""
        rows = module.trained.of(module.theta.detach())
        update = finite(self._update(module, cohort, rows))
        take = self._explored if self.phase.explores else self._learned
        arrived, sizes, kept = take(update, rows)
        refused, clients = arrived.refused, tuple(client for _, client in cohort.members)
        dropped = tuple(Dropped(self.round, client, refused[k]) for k, client in cohort.members if k in refused)
        self._tell(Report(clients, sizes[: len(clients)], dropped, kept, module.steps, module.clipped))

    def _update(self, module: ClientModule, cohort: Cohort, rows: Tensor) -> Update:
        """What a cohort changed."""
        return Update(
            cohort.clients,
            self._difference(rows),
            self.buffers.take(len(cohort.clients)),
            self._weights(module, cohort),
            module.mean_loss,
            anchor=self.begin,
            values=rows,
            round=cohort.round,
            steps=module.step_weights(module.taken) if self.weighs_steps else (),
        )

    def _weights(self, module: ClientModule, cohort: Cohort) -> tuple[float, ...]:
        """Weights of K clients: by what they have processed, where some may have stopped early."""
        if not (cohort.processed and self.phase.patience):
            return cohort.weight
        return tuple(float(sum(counts)) for counts in zip(*module.taken, strict=True))

    def _learned(self, update: Update, rows: Tensor) -> tuple[Update, tuple[Size, ...], Kept]:
        """Send what was learned, add it up, and let the mask rule hear it: what arrived, bytes, what clients keep."""
        payload = self.exchange.encode(update)
        received = self.exchange.decode(payload, update)
        self.aggregation.add(self.tally, received, self.group)
        if self._listens() and (told := self.choice.rule.hear(received.rows, self.begin)) is not None:  # type: ignore[union-attr]
            self.guide.add(told, received.weight, received.loss)
        kept = self._kept(update.clients, rows) | self.exchange.kept()
        kept |= self.objective.finish(update.rows, update.clients, self.lr, update.steps)
        return received, self._sizes(payload), of_those(kept, received)

    def _explored(self, update: Update, rows: Tensor) -> tuple[Update, tuple[Size, ...], Kept]:
        """Send the squared deviations; with ``keep_model`` the next client goes on from here, and is sent the model."""
        self.guide.add(update.rows.square(), update.weight, update.loss)
        if self.phase.updates_model and counted(update):
            self.chain = rows[:1].clone()
            self.buffers.hand_on()
        n, dtype = self.exchange.size, update.rows.dtype
        guide, model = known_size(n, 0, dtype), known_size(n, self.buffers.size, dtype)
        size = guide * self._guides() + model * self.phase.updates_model
        return update, (size,) * len(update.clients), {}

    def _guides(self) -> bool:
        """Whether the mask rule is told what clients explored."""
        return self.choice is not None and self.choice.rule.explores and self.phase.informs_mask

    def _listens(self) -> bool:
        """Whether the mask rule hears what clients learn in this phase."""
        return self.choice is not None and self.choice.rule.listens and self.phase.informs_mask

    def _sizes(self, payload: Payload) -> tuple[Size, ...]:
        """Bytes that each client sent, an objective's own messages included."""
        if not self.objective.messages:
            return payload.sizes
        more = known_size(self.exchange.size, 0, payload.update.rows.dtype) * self.objective.messages
        return tuple(size + more for size in payload.sizes)

    def _kept(self, clients: tuple[int, ...], rows: Tensor) -> Kept:
        """Local coordinates and buffers, which clients keep for themselves."""
        local = {LOCAL: (clients, rows[:, self.local])} if self.keeps_local else {}
        buffers = self.buffers.kept()
        return local if buffers is None else local | {BUFFERS: (clients, buffers)}

    def _tell(self, report: Report) -> None:
        """Note what a cohort leaves; of several processes all do at the round's end, when they hear of it."""
        if parallel.joined():
            self.reports.append(report)
        else:
            self._note(report)

    def _note(self, report: Report) -> None:
        """Count bytes and dropped updates, and keep what the clients keep."""
        for client, up in zip(report.clients, report.up, strict=True):
            self._count(client, up)
        self.dropped += report.dropped
        self.ledger.client_steps += report.steps
        self.ledger.round_steps += report.steps
        self.ledger.clipped_steps += report.clipped
        for name, (clients, rows) in report.kept.items():
            self.objective.take(name, clients, rows)
            self.stores[name].write(clients, rows)

    def _count(self, client: int, up: Size) -> None:
        """Count what a client sent and received: the model at first contact, later what moved since."""
        first, dtype, extra = client not in self.ledger.has_model, self.row.dtype, self.buffers.size
        setup = self.ledger.bytes_setup_down
        self.ledger.first_model([client], self.model_length - self.zeros)
        self.ledger.mask([client], self.mask_length)
        setup = self.ledger.bytes_setup_down - setup
        down = NOTHING if first else self.downlink.size(client, self.row, extra)
        if self.objective.messages and not self.phase.explores:
            down += known_size(self.exchange.size, 0, dtype) * self.objective.messages
        dense = self.dense + self.buffers.row.nbytes
        self.ledger.trained(client, up, down, dense, setup, prepares=self.phase.explores)
        self.arrived.append(client)

    def _difference(self, rows: Tensor) -> Tensor:
        """What the cohort changed, (K, n), in memory that the next cohort writes again."""
        if self.change is None or self.change.shape != rows.shape:
            self.change = torch.empty_like(rows)
        return torch.sub(rows, self.begin, out=self.change)

    def _close(self, module: ClientModule) -> None:
        """Hear all processes, take the round's step, and put the new global row into the network."""
        for reports in parallel.gather(self.reports):
            for report in reports:
                self._note(report)
        self.objective.close()
        closed = self._close_exploration(module) if self.phase.explores else self._close_learning(module)
        dropped = [drop for drop in self.dropped if drop.round == self.round]
        if closed is None:
            raise EveryUpdateDropped.of(self.round, dropped, self.phase.lr_key)
        if parallel.process() == 0:
            for line in named(dropped):
                log.warning("round %d: %s", self.round + 1, line)
        self.loss = closed
        module.space.write(module.net, module.server.rows[0])
        self._settle(module)
        del self.tally, self.guide  # before the next round takes memory for its own

    def _close_learning(self, module: ClientModule) -> float | None:
        """Average, step the server, and tell the mask rule: the mean loss, or None if nobody sent."""
        change = self.aggregation.finish(self.aggregation.merge(self.tally))
        if change is None:
            return None
        module.server.step(change)
        if not all(finite_rows(module.server.values)):
            raise Diverged(
                f"round {self.round + 1}: the server's step made the model NaN or infinite, so the run stops; try a "
                "smaller server.lr"
            )
        self.buffers.close(change.buffers)
        told = self.guide.finish() if self._listens() else None
        if told is not None:
            self.choice.hear(told[0], module.trained)  # type: ignore[union-attr]
        return change.loss

    def _close_exploration(self, module: ClientModule) -> float | None:
        """Tell the mask rule the mean squared deviation; the global row stays, or is where the last client stopped."""
        found = self.guide.finish()
        if found is None:
            return None
        if self._guides():
            self.choice.explore(module.trained.spread(found[0]))  # type: ignore[union-attr]
        if self.chain is not None:
            module.server.put(self.chain)
        self.buffers.stay()
        return found[1]

    def _choose(self, trainer: lightning.Trainer, module: ClientModule) -> None:
        """Choose a mask before the first round after an exploration, and anew where the sparsity says so.

        Before a round, not after the one before: so a checkpoint holds what the choice is made of, and a run that is
        given more rounds makes it too.
        """
        assert self.phases is not None
        explored = self.round > 0 and self.phases.at(self.round - 1)[0].explores
        learned = self.phases.of_kind(self.round)
        if self.choice is None or self.phase.explores:
            return
        if not explored and not (self.phase.informs_mask and self.choice.renews(learned)):
            return
        mask = self.choice.choose(module.server.rows[0], learned)
        self._remask(trainer, module, mask.row(module.space).to(module.device))
        self.mask_length = length_of(mask)

    def _remask(self, trainer: lightning.Trainer, module: ClientModule, mask: Tensor) -> None:
        """Let other coordinates train: all that is kept of each follows, and clients are sent the mask."""
        pruned = self.choice is not None and self.choice.prunes
        before, travelled, stayed = module.trained, self._only(module, False), self._only(module, True)
        module.remask(mask, pruned)
        trainer.optimizers = [module.local, module.server.optimizer]
        self._see_trained(module)
        move = Move(before, module.trained)
        self.exchange.follow(mask)
        self.objective.follow(move)
        moves = {LOCAL: Move(stayed, self._only(module, True))}
        for name in self.stores.keys() - {BUFFERS}:
            self.stores[name].convert(moves.get(name, move))
        self.downlink.follow(Move(travelled, self._only(module, False)), self.round - 1, pruned)
        self.ledger.has_mask.clear()
        self.base_lr = [group["initial_lr"] for group in _with_initial_lr(module.local)]

    def _only(self, module: ClientModule, local: bool) -> Coordinates:
        """Those of all P coordinates that train, and stay with the client or travel."""
        return Coordinates(torch.as_tensor(module.mask) & (module.space.local.to(module.device) == local))

    def _settle(self, module: ClientModule) -> None:
        """Note what the round moved and who holds what, and write its traffic down."""
        self.downlink.close(self.round, self.row, self._travelling(module))
        for client in self.arrived:
            self.downlink.told(client, self.round)
        self.traffic.write(self.round + 1, self.ledger.close())

    def _travelling(self, module: ClientModule) -> Tensor:
        """Copy the global values that travel, (n,)."""
        values = module.server.values[0]
        return values[self.travels] if self.keeps_local else values.clone()

    def _with_local(self, clients: Sequence[int], rows: Tensor) -> Tensor:
        """Replace the local coordinates by what each client kept."""
        if not self.keeps_local:
            return rows
        rows = rows.clone()
        rows[:, self.local] = read(self.store, clients, rows[:, self.local])
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What lasts over rounds and is not the network's or the server optimizer's."""
        return {
            "ledger": self.ledger.state_dict(),
            "dropped": [(d.round, d.client) for d in self.dropped],
            "stores": {name: store.state_dict() for name, store in self.stores.items()},
            "downlink": self.downlink.state_dict(),
            "objective": self.objective.state_dict(),
            "choice": None if self.choice is None else self.choice.state_dict(),
            "phases": self.phases.closed(self.round + 1) if self.phases else [],
        }

    def saved(self) -> None:
        """Be told that a checkpoint to resume from is whole on the disk."""
        for store in self.stores.values():
            store.saved()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state; stores, objective and mask rule have theirs once training starts."""
        self.ledger.load_state_dict(state["ledger"])
        self.dropped = [Dropped(*d) for d in state["dropped"]]
        self.downlink.load_state_dict(state["downlink"])
        self.loaded = state


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the one device that trains; ``torch.manual_seed`` seeds all there might be, at half a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _with_initial_lr(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Param groups with the learning rate they were made with, as torch's schedulers keep it."""
    for group in optimizer.param_groups:
        group["initial_lr"] = optimizer.defaults["lr"]
    return optimizer.param_groups
