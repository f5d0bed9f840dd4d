"""The protocol of one round, and only that.

Shapes: G global rows, K clients of the cohort, n coordinates that train, Q float-buffer values. What does not train is
not touched: it stays in the network and in the rows of clients and server as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning
import torch
from torch import Tensor

from fedsparse.data.rounds import Cohort
from fedsparse.federation import parallel
from fedsparse.federation.aggregation import Aggregation, FedNova
from fedsparse.federation.buffers import Buffers
from fedsparse.federation.client import ClientModule
from fedsparse.federation.downlink import Downlink
from fedsparse.federation.exchange import Exchange
from fedsparse.federation.ledger import Ledger
from fedsparse.federation.schedule import Schedule, constant
from fedsparse.federation.store import ClientStore, MemoryStore, read
from fedsparse.federation.topology import Topology
from fedsparse.federation.traffic import Traffic
from fedsparse.federation.update import Payload, Update
from fedsparse.federation.wire import HEADER, Size, known_size
from fedsparse.keys import Purpose, number

LOCAL, BUFFERS = "clients", "client_buffers"  # names of stores; those of filters and objectives come to them
NOTHING = Size(0, 0, 0)


@dataclass(frozen=True)
class Dropped:
    """An update that was not finite and was left out."""

    round: int
    client: int


@dataclass(frozen=True)
class Report:
    """What a cohort's training leaves beside its update, for every process to know.

    Attributes:
        clients: who trained.
        up: bytes that each sent.
        dropped: updates that were left out.
        kept: what clients keep, by the store's name: their ids, and a row each.

    """

    clients: tuple[int, ...]
    up: tuple[Size, ...]
    dropped: tuple[Dropped, ...]
    kept: dict[str, tuple[tuple[int, ...], Tensor]]


class EveryUpdateDropped(RuntimeError):
    """No client of a round sent a finite update: there is nothing to go on with."""


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
    downlink: Downlink = field(default_factory=Downlink)
    dropped: list[Dropped] = field(default_factory=list)
    stores: dict[str, ClientStore] = field(default_factory=dict)
    loaded: dict[str, Any] | None = None
    loss: float = math.nan
    lr: float = math.nan

    def on_train_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Prepare what lasts over rounds: local coordinates and the base learning rate."""
        self.local = module.trained.of(module.space.local.to(module.device))
        self.keeps_local = bool(self.local.any())
        self.travels = ~self.local
        self.change: Tensor | None = None
        self.base_lr = [group["initial_lr"] for group in _with_initial_lr(module.local)]
        self.dense = HEADER.size + module.server.rows[0].nbytes
        self.buffers.open(module.net)
        self.objective = module.objective
        self.stores = {LOCAL: self.store, BUFFERS: self.buffers.store}
        self.stores |= self.exchange.stores() | self.objective.stores
        self.weighs_steps = self.objective.messages > 0 or isinstance(self.aggregation, FedNova)
        self._resume()

    def _resume(self) -> None:
        """Give objective and stores what a checkpoint holds for them."""
        if self.loaded is None:
            return
        self.objective.load_state_dict(self.loaded["objective"])
        for name, store in self.stores.items():
            store.load_state_dict(self.loaded["stores"][name])
        self.loaded = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: ClientModule) -> None:  # type: ignore[override]
        """Open the round: an empty tally, and this round's learning rate."""
        groups, size = module.server.values.shape
        self.tally = self.aggregation.zero(groups, size, self.buffers.size, module.device, self.exchange.own)
        self.reports: list[Report] = []
        self.arrived: list[int] = []
        self.row = self._travelling(module)
        factor = self.schedule(trainer.current_epoch, int(trainer.max_epochs or 0))
        for group, lr in zip(module.local.param_groups, self.base_lr, strict=True):
            group["lr"] = self.lr = lr * factor

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, batch: Cohort, batch_idx: int
    ) -> None:
        """Send the global values to the cohort."""
        self.group = self.topology.group(batch.clients)
        self.begin = self._with_local(batch.clients, module.server.broadcast(self.group))
        module.start(self.begin, module.own_masks(batch.clients), batch.clients)
        self.buffers.send(batch.clients)
        if batch.members:
            seed_dropout(module.device, number(self.seed, Purpose.DROPOUT, batch.round, batch.clients[0]))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: lightning.Trainer, module: ClientModule, outputs: Any, batch: Cohort, batch_idx: int
    ) -> None:
        """Take the cohort's update in, and close the round after the last one."""
        if batch.members:
            self._take(module, batch)
        if trainer.is_last_batch:
            self._close(module, batch.round)

    def _take(self, module: ClientModule, cohort: Cohort) -> None:
        """Take a cohort's update in."""
        rows, members = module.trained.of(module.theta.detach()), cohort.members
        whole = Update(
            cohort.clients,
            self._difference(rows),
            self.buffers.take(len(cohort.clients)),
            cohort.weight,
            module.mean_loss,
            anchor=self.begin,
            round=cohort.round,
            steps=module.step_weights(cohort.count) if self.weighs_steps else (),
        )
        update, dropped = self._finite(cohort, whole)
        payload = self.exchange.encode(update)
        self.aggregation.add(self.tally, self.exchange.decode(payload), self.group)
        clients = tuple(client for _, client in members)
        kept = self._kept(update, rows) | self.exchange.kept() | self._variates(update, self.lr)
        self._tell(Report(clients, self._sizes(payload)[: len(clients)], dropped, kept))

    def _sizes(self, payload: Payload) -> tuple[Size, ...]:
        """Bytes that each client sent, an objective's own messages included."""
        if not self.objective.messages:
            return payload.sizes
        more = known_size(self.exchange.size, 0, payload.update.rows.dtype) * self.objective.messages
        return tuple(size + more for size in payload.sizes)

    def _kept(self, update: Update, rows: Tensor) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Local coordinates and buffers that those keep whose update counts."""
        counted = _counted(update)
        clients = tuple(update.clients[k] for k in counted)
        local = {LOCAL: (clients, rows[:, self.local][counted].cpu())} if self.keeps_local else {}
        buffers = self.buffers.kept()
        return local if buffers is None else local | {BUFFERS: (clients, buffers[counted])}

    def _variates(self, update: Update, lr: float) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """What the objective lets those keep whose update counts."""
        if not self.objective.stores:
            return {}
        kept = self.objective.finish(update.rows, update.clients, lr, update.steps)
        counted = _counted(update)
        return {name: (tuple(ids[k] for k in counted), rows[counted].cpu()) for name, (ids, rows) in kept.items()}

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
        for name, (clients, rows) in report.kept.items():
            self.objective.take(name, clients, rows)
            self.stores[name].write(clients, rows)

    def _count(self, client: int, up: Size) -> None:
        """Count what a client sent and received: the model at first contact, later what moved since."""
        first, dtype, extra = client not in self.ledger.has_model, self.row.dtype, self.buffers.size
        setup = self.ledger.bytes_setup_down
        self.ledger.first_model([client], self.model_length)
        self.ledger.mask([client], self.mask_length)
        setup = self.ledger.bytes_setup_down - setup
        down = NOTHING if first else self.downlink.size(client, self.row, extra)
        if self.objective.messages:
            down += known_size(self.exchange.size, 0, dtype) * self.objective.messages
        dense = self.dense + self.buffers.row.nbytes
        self.ledger.trained(client, up, down, dense, setup)
        self.arrived.append(client)

    def _difference(self, rows: Tensor) -> Tensor:
        """What the cohort changed, (K, n), in memory that the next cohort writes again."""
        if self.change is None or self.change.shape != rows.shape:
            self.change = torch.empty_like(rows)
        return torch.sub(rows, self.begin, out=self.change)

    def _close(self, module: ClientModule, round: int) -> None:
        """Average, step the server, and put the new global row into the network."""
        for reports in parallel.gather(self.reports):
            for report in reports:
                self._note(report)
        self.objective.close()
        change = self.aggregation.finish(self.aggregation.merge(self.tally))
        if change is None:
            raise EveryUpdateDropped(self._nothing_left(round))
        module.server.step(change)
        module.space.write(module.net, module.server.rows[0])
        self.buffers.close(change.buffers)
        self._settle(module, round)
        self.loss = change.loss
        del self.tally  # before the next round takes memory for its own

    def _settle(self, module: ClientModule, round: int) -> None:
        """Note what the round moved and who holds what, and write its traffic down."""
        self.downlink.close(round, self.row, self._travelling(module))
        for client in self.arrived:
            self.downlink.told(client, round)
        self.traffic.write(round + 1, self.ledger.close())

    def _travelling(self, module: ClientModule) -> Tensor:
        """Copy the global values that travel, (n,)."""
        values = module.server.values[0]
        return values[self.travels] if self.keeps_local else values.clone()

    def _nothing_left(self, round: int) -> str:
        return (
            f"round {round + 1}: the loss or update of every client became NaN or infinite, so the run stops; "
            "try a smaller optimizer.lr, or optimizer.clip_norm=1.0"
        )

    def _finite(self, cohort: Cohort, update: Update) -> tuple[Update, tuple[Dropped, ...]]:
        """Drop updates that are not finite: by selection, so that NaN never reaches the tally; and say whose."""
        sums = update.rows.sum(1) + update.buffers.sum(1) if self.buffers.size else update.rows.sum(1)
        good = [math.isfinite(a) and math.isfinite(b) for a, b in zip(sums.tolist(), update.loss, strict=True)]
        if all(good):
            return update, ()
        dropped = tuple(Dropped(cohort.round, client) for row, client in cohort.members if not good[row])
        keep = torch.tensor(good, device=update.rows.device).unsqueeze(1)
        left = replace(
            update,
            rows=torch.where(keep, update.rows, 0.0),
            buffers=torch.where(keep, update.buffers, 0.0),
            weight=tuple(w if g else 0.0 for w, g in zip(update.weight, good, strict=True)),
            loss=tuple(v if g else 0.0 for v, g in zip(update.loss, good, strict=True)),
        )
        return left, dropped

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
        }

    def saved(self) -> None:
        """Be told that a checkpoint to resume from is whole on the disk."""
        for store in self.stores.values():
            store.saved()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint; the stores and the objective have theirs once training starts."""
        self.ledger.load_state_dict(state["ledger"])
        self.dropped = [Dropped(*d) for d in state["dropped"]]
        self.downlink.load_state_dict(state["downlink"])
        self.loaded = state


def _counted(update: Update) -> list[int]:
    """Rows whose update counts: neither padding nor dropped."""
    return [k for k, weight in enumerate(update.weight) if weight > 0]


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
