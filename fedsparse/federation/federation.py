"""A federation: clients, exchange, server and stores, with all state that outlives a round.

Shapes: G global rows, K clients of a cohort, P coordinates of which n train.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsparse.core import parallel
from fedsparse.core.subspace import Carry, Subspace
from fedsparse.federation.bytecount import ByteCount, PreparedHead
from fedsparse.federation.client.buffers import BUFFERS
from fedsparse.federation.client.training import LOCAL, Clients
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.ledger import Ledger, Traffic
from fedsparse.federation.explore import Explore
from fedsparse.federation.masking import MaskSchedule
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.reports import Dropped, Report, named
from fedsparse.federation.round import Round
from fedsparse.federation.schedule import Schedule, constant
from fedsparse.federation.server.aggregation import Aggregation, Change, Tally, WeightedMean
from fedsparse.federation.server.merging import Merging
from fedsparse.federation.server.mixing import Mixing
from fedsparse.federation.server.regrouping import SENT, Regrouping
from fedsparse.federation.server.server import MakeOptimizer, Server
from fedsparse.federation.server.topology import Flat, Topology
from fedsparse.federation.stores.store import ClientStore, MemoryStore, Part, read
from fedsparse.federation.watcher import Watcher

log = logging.getLogger("fedsparse")
FEDAVG = partial(torch.optim.SGD, lr=1.0)


class Keeper(Protocol):
    """An object with one number for each coordinate that trains."""

    def move(self, carry: Carry) -> None:
        """Carry these numbers over to another mask, between two rounds."""


class Federation:
    """Clients, exchange, server and their state; with clients as the only argument, federated averaging.

    Args:
        clients: train the cohorts.
        exchange: encodes and decodes updates; by default all trained coordinates are sent.
        aggregation: combines updates into one change; by default the weighted mean.
        topology: which global row each client starts from and adds to; by default one for all.
        merging: merges low-rank updates into frozen weights; None: these stay.
        mixing: mixes the rows of groups after the server's step; None: they stay apart.
        regrouping: assigns clients to the topology's groups between rounds; None: they stay where they are.
        make_server: builds the server's optimizer; by default SGD with learning rate 1, which is FedAvg.
        untouched: rule for coordinates that no client sent; see ``Server``.
        phases: of the run; by default all rounds are learning rounds.
        schedule: factor of the clients' learning rate, from (round, rounds).
        choice: chooses masks between rounds; None: the mask stays.
        store: of coordinates that stay with the clients; in memory by default.
        ledger: sums of bytes.
        traffic: table of the bytes of each client and round.
        model_length: bytes of the first model.
        head: a prepared head that rounds do not bring; None without one.
        watchers: observe rounds, after the byte counter and the mask rule's evidence.
        count_bytes: whether bytes are counted.

    Attributes:
        stores: what clients keep between rounds, by name.
        keepers: objects with a number for each trained coordinate, which follow a changed mask.
        sums: of the last round, whose memory the next one takes; None where rounds cannot share it.
        dropped: updates that were left out of the average.
        closed: number of closed rounds.

    Raises:
        ValueError: the mask may change while several global rows differ in what stops training.

    """

    def __init__(
        self,
        clients: Clients,
        exchange: Exchange | None = None,
        aggregation: Aggregation | None = None,
        topology: Topology | None = None,
        make_server: MakeOptimizer = FEDAVG,
        *,
        merging: Merging | None = None,
        mixing: Mixing | None = None,
        regrouping: Regrouping | None = None,
        untouched: str = "hold",
        phases: Phases | None = None,
        schedule: Schedule = constant,
        choice: MaskSchedule | None = None,
        store: ClientStore | None = None,
        ledger: Ledger | None = None,
        traffic: Traffic | None = None,
        model_length: int = 0,
        head: PreparedHead | None = None,
        watchers: Sequence[Watcher] = (),
        count_bytes: bool = True,
    ) -> None:
        self.phases = Phases([Phase("learn")]) if phases is None else phases
        subspace, local, prunes = clients.subspace, clients.space.local, choice is not None and choice.prunes
        self.clients = clients
        self.exchange = Exchange(subspace.mask, local, space=clients.space) if exchange is None else exchange
        self.aggregation = WeightedMean() if aggregation is None else aggregation
        self.topology = topology = Flat() if topology is None else topology
        self.mixing, self.merging, self.regrouping = mixing, merging, regrouping
        self.objective, self.buffers, self.schedule, self.choice = clients.objective, clients.buffers, schedule, choice
        _check_groups(topology, choice, self.phases)
        self.exchange.follow(subspace.mask)
        self.buffers.spread(topology.groups)
        rows = clients.space.read(clients.net).expand(topology.groups, -1).contiguous()
        self.server = Server(rows, make_server, subspace, untouched)
        self.ledger, traffic = Ledger() if ledger is None else ledger, Traffic() if traffic is None else traffic
        sent = model_length, prunes, merging, head
        self.bytes = ByteCount(self.ledger, traffic, subspace, local, topology.groups, *sent)
        updated = [choice] if choice is not None and choice.scores_updates else []
        self.watchers: list[Watcher] = [*[self.bytes] * count_bytes, *updated, *watchers]
        store = MemoryStore() if store is None else store
        added = self.exchange.stores | self.objective.stores
        compared = {} if regrouping is None else {SENT: regrouping.store}
        self.stores: dict[str, ClientStore] = {LOCAL: store, BUFFERS: self.buffers.store, **added, **compared}
        self.keepers: list[Keeper] = [clients, self.server, self.exchange, self.objective, self.bytes]
        self.keepers += [Part(store, local), *added.values()]
        self.sums: Tally | None = None
        self.dropped: list[Dropped] = []
        self.closed = 0

    def open(self, number: int) -> Round:
        """Open a round, from 0: choose its mask if one is due, and its learning rate; its sums are empty."""
        phase, number_in_phase = self.phases.at(number)
        if self.choice is not None and self.choice.due(number, self.phases):
            mask = self.choice.choose(self.server.rows[0], self.phases.of_kind(number))
            self.train_only(mask.row(self.clients.space), number)
        factor = 1.0 if phase.explores else self.schedule(number_in_phase, phase.rounds)
        lr = self.clients.lr * factor if phase.lr is None else phase.lr
        if self.merging is not None:
            self.merging.open()
        round = (Explore if phase.explores else Round)(self, number, phase, lr)
        for watcher in self.watchers:
            watcher.open(round)
        return round

    def tally(self, size: int) -> Tally:
        """Start the sums of a round over n coordinates, in the memory of the last round's where they fit."""
        wanted = self.topology.groups, size, self.buffers.size, self.server.rows.device, self.exchange.per_coordinate
        if self.sums is not None and self.sums.layout == wanted:
            return self.sums.restart()
        tally = self.aggregation.zero(*wanted)
        self.sums = tally if tally.layout == wanted else None
        return tally

    def train_only(self, mask: Tensor, number: int) -> None:
        """Train the coordinates of another mask, bool (P,), from a round on: every keeper carries its numbers over."""
        prunes = self.choice is not None and self.choice.prunes
        after = Subspace(mask.to(self.server.rows.device))
        carry = Carry(self.server.subspace, after, number, prunes)
        for keeper in self.keepers:
            keeper.move(carry)

    def restored(self, clients: Sequence[int], values: Tensor, local: Tensor) -> Tensor:
        """Replace the local coordinates, bool (n,), of values (K, n) by those that each client has stored."""
        values = values.clone()
        values[:, local] = read(self.stores[LOCAL], clients, values[:, local])
        return values

    def keep(self, report: Report) -> Report:
        """Store the rows that clients keep, and return the report without them."""
        self.objective.update(report.kept)
        for name, (clients, rows) in report.kept.items():
            self.stores[name].write(clients, rows)
        return replace(report, kept={})

    def settle(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Load the first group's new model into the network, log dropped updates, and close the watchers."""
        self.show(0)
        dropped = [drop for report in reports for drop in report.dropped]
        for line in named(dropped) if dropped and parallel.process() == 0 else ():
            log.warning("round %d: %s", round.number + 1, line)
        self.dropped += dropped
        for watcher in round.watchers:
            watcher.close(round, reports, change)
        self.closed = round.number + 1

    def show(self, group: int) -> None:
        """Load the model of a group, buffers included, into the network."""
        self.clients.space.write(self.clients.net, self.server.rows[group])
        if self.buffers.space.size:
            self.buffers.show(group)

    def state_dict(self) -> dict[str, Any]:
        """All state that outlives a round, without the first global row, which is stored as the network's weights."""
        return {
            **self.bytes.state_dict(),
            "dropped": [(drop.round, drop.client) for drop in self.dropped],
            "stores": {name: store.state_dict() for name, store in self.stores.items()},
            "objective": self.objective.state_dict(),
            "choice": None if self.choice is None else self.choice.state_dict(),
            "phases": self.phases.closed(self.closed),
            "server": self.server.state_dict(),
            "merging": None if self.merging is None else self.merging.state_dict(),
            "regrouping": None if self.regrouping is None else self.regrouping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: its rounds belong to other phases.

        """
        self.phases.check(state["phases"])
        self.closed = sum(count for _, count in state["phases"])
        self.bytes.load_state_dict(state)
        self.dropped = [Dropped(*drop) for drop in state["dropped"]]
        if self.choice is not None:
            self.choice.load_state_dict(state["choice"])
        self.objective.load_state_dict(state["objective"])
        self.server.load_state_dict(state["server"])
        if self.merging is not None:
            self.merging.load_state_dict(state["merging"])
        if self.regrouping is not None:
            self.regrouping.load_state_dict(state["regrouping"])
        for name, store in self.stores.items():
            store.load_state_dict(state["stores"][name])

    def saved(self) -> None:
        """Release the stored rows that neither of the last two checkpoints refers to, once a new one is on disk."""
        for store in self.stores.values():
            store.saved()


def _check_groups(topology: Topology, choice: MaskSchedule | None, phases: Phases) -> None:
    """Refuse a changing mask with several global rows, which differ in coordinates that stop training.

    Raises:
        ValueError: one line that says what to set.

    """
    if topology.groups > 1 and choice is not None and (choice.changes or phases.explore is not None):
        raise ValueError("a mask that changes needs topology=flat: what stops training is one value for all clients")
