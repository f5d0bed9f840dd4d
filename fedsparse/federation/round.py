"""One round of federated optimisation, of clients, exchange and server.

Shapes: G global rows, K clients of a cohort, n coordinates that train, Q float-buffer values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fedsparse.core import parallel
from fedsparse.data.rounds import PADDING, Cohort
from fedsparse.federation.client.drift import VARIATES
from fedsparse.federation.client.training import Clients
from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.update import Payload, Start, Update, finite_rows, of_those
from fedsparse.federation.exchange.wire.message import Size
from fedsparse.federation.phases import Phase
from fedsparse.federation.reports import Dropped, EveryUpdateDropped, Report
from fedsparse.federation.server.aggregation import Change
from fedsparse.federation.server.mixing import Mixed
from fedsparse.federation.server.regrouping import SENT
from fedsparse.federation.watcher import Watcher

if TYPE_CHECKING:
    from fedsparse.federation.federation import Federation


def play(federation: Federation, clients: Clients, cohorts: Iterable[Cohort], number: int) -> float:
    """One round of federated optimisation (Reddi et al. 2021, algorithm 1); returns the clients' mean loss.

    Args:
        federation: exchange, server and the state that outlives a round.
        clients: train the cohorts.
        cohorts: of this round.
        number: of the round, from 0.

    """
    round = federation.open(number)  # empty sums; mask and learning rate of this round
    take_part(round, clients, cohorts)
    return round.close()  # x_{t+1} = x_t + eta * opt(sum_k w_k Delta_k / sum_k w_k)


def take_part(round: Round, clients: Clients, cohorts: Iterable[Cohort]) -> None:
    """Train cohorts in an open round; one without clients, which evens out several processes, is skipped."""
    for cohort in cohorts:
        if max(cohort.clients) != PADDING:
            start = round.send(cohort)  # x_t: the row of each one's group
            update = clients.train(start, cohort)  # Delta_k: local steps of masked SGDM        client/
            message = round.encode(update)  # what travels                                      exchange/
            round.receive(cohort, message)  # decoded, checked, weighed, added up               server/


TakePart = Callable[["Round", Clients, Iterable[Cohort]], None]


class Round:
    """A learning round.

    Args:
        federation: that the round belongs to.
        number: of the round, from 0.
        phase: of the round.
        lr: the clients' learning rate.

    Attributes:
        reports: of the cohorts of this process, so far.
        tally: sums of their updates.
        mixed: the global rows after they were mixed; None before, and where they are not.
        watchers: of all rounds, and of this one.

    """

    def __init__(self, federation: Federation, number: int, phase: Phase, lr: float) -> None:
        self.federation, self.number, self.phase, self.lr = federation, number, phase, lr
        self.reports: list[Report] = []
        self.mixed: Mixed | None = None
        self.watchers = list(federation.watchers)
        f, size = federation, 0 if phase.explores else federation.server.subspace.size
        self.tally = f.tally(size)

    def watch(self, watcher: Watcher) -> None:
        """Add a watcher of this round alone."""
        self.watchers.append(watcher)

    def send(self, cohort: Cohort) -> Start:
        """Give K clients their start: values, learning rate, group and early stopping."""
        f, group = self.federation, self.federation.topology.group(cohort.clients)
        values = f.server.broadcast(group)
        if f.clients.local is not None:
            values = f.restored(cohort.clients, values, f.clients.local)
        return Start(values, self.lr, group, self.phase.patience, self.phase.local_epochs or 1)

    def encode(self, update: Update) -> Payload:
        """Encode a cohort's update as its clients send it."""
        return self.federation.exchange.encode(update)

    def receive(self, cohort: Cohort, payload: Payload) -> None:
        """Decode a cohort's messages, add them to the sums, and append the cohort's report."""
        f, group = self.federation, self.federation.topology.group(cohort.clients)
        received = f.exchange.decode(payload, cohort.weight)
        f.aggregation.add(self.tally, received, group)
        if f.merging is not None:
            f.merging.receive(received, f.server.rows[0], f.server.subspace)
        for watcher in self.watchers:
            watcher.receive(self, payload.update, received)
        kept = dict(payload.update.kept)
        if received.variates is not None:
            kept[VARIATES] = (received.clients, received.variates)  # as received: both sides keep equal variates
        if f.regrouping is not None:
            kept[SENT] = (received.clients, f.regrouping.sent(f.server, received, group))
        if kept or payload.kept:
            kept = of_those(kept, received) | of_those(payload.kept, received, known=True)
        report = Report.of(self.number, received, group, payload.sizes, kept)
        if report.kept:
            report = report.on_cpu() if parallel.joined() else f.keep(report)  # of other processes, when it closes
        self.reports.append(report)

    def miss(self, cohort: Cohort, why: str) -> None:
        """Append the report of a cohort from which nothing arrived; the round is that of the others."""
        clients, group = tuple(client for _, client in cohort.members), self.federation.topology.group(cohort.clients)
        dropped = tuple(Dropped(self.number, client, why) for client in clients)
        self.reports.append(Report(clients, group[: len(clients)], (Size(0, 0, 0),) * len(clients), dropped, {}))

    def close(self) -> float:
        """Close the round: average, step the server, load the new model into the network, and close the watchers.

        Returns:
            The clients' mean loss.

        Raises:
            EveryUpdateDropped: all updates were left out.
            Diverged: the new model is not finite.

        """
        f = self.federation
        everyone = [report for part in parallel.gather(self.reports) for report in part]  # of all processes
        reports = [f.keep(report) if report.kept else report for report in everyone]
        f.objective.close()
        for watcher in self.watchers:
            watcher.step(self)
        change = self._step()
        if change is None:
            dropped = [drop for report in reports for drop in report.dropped]
            raise EveryUpdateDropped.of(self.number, dropped, self.phase.lr_key)
        f.settle(self, reports, change)
        return change.loss

    def _step(self) -> Change | None:
        """Average the updates and step the server: the mean change, or None without updates."""
        f = self.federation
        change = f.aggregation.finish(f.aggregation.merge(self.tally))
        if change is not None:
            change = f.server.step(change)
            if f.merging is not None:
                f.server.put(f.server.subspace.of(f.merging.close(self.number, f.server.rows[0]).unsqueeze(0)))
            if f.mixing is not None:
                self.mixed = f.mixing(f.server.rows, self.number)
                f.server.put(f.server.subspace.of(self.mixed.rows))
            f.buffers.step(change.buffers, change.sent)
            if f.regrouping is not None:
                f.regrouping.close(self.number, f.server, f.buffers)
            if not all(finite_rows(f.server.values, sums=f.server.values.sum(1).tolist())):
                raise Diverged(
                    f"round {self.number + 1}: the server's step made the model NaN or infinite, so the run stops; try "
                    "a smaller server.lr"
                )
        return change
