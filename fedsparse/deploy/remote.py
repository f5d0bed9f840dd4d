"""The clients of a deployed run as its server has them: what each is sent, and what becomes of the answers."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedsparse.data.rounds import PADDING, Cohort
from fedsparse.deploy.messages import Answer, Malformed
from fedsparse.deploy.post import Errand, Member, Post, Said
from fedsparse.deploy.worker import LACKS
from fedsparse.federation.client.training import Clients
from fedsparse.federation.exchange.update import Payload, Update
from fedsparse.federation.exchange.wire.message import PayloadError, split_size
from fedsparse.federation.exchange.wire.model import write_model
from fedsparse.federation.federation import Federation
from fedsparse.federation.round import Round
from fedsparse.job.parts import Assembly
from fedsparse.preparation.preparation import Answer as Tensors
from fedsparse.preparation.preparation import Preparation
from fedsparse.preparation.tasks import ClientTask
from fedsparse.simulation.own_models import Pairs

log = logging.getLogger("fedsparse")


class RemoteClients:
    """The clients of a run at their nodes.

    Args:
        post: sends requests and sorts answers.
        members: by client.
        assembly: the parts of the run.
        max_share: largest share of one client's weight in a round.

    Attributes:
        model: the first model, of before the preparation.
        holders: clients to which it was sent.

    """

    def __init__(self, post: Post, members: Mapping[int, Member], assembly: Assembly, max_share: float = 1.0) -> None:
        self.post, self.members, self.assembly, self.max_share = post, members, assembly, max_share
        self.model = write_model(assembly.problem.net, assembly.problem.space)
        self.holders: set[int] = set()

    def gather(self, preparation: Preparation, task: ClientTask, clients: Sequence[int]) -> Iterator[Tensors | None]:
        """Run a task for clients: what each sends, in their order; None of one without an answer."""
        parts = {str(place): part for place, part in enumerate(task.down(preparation))}
        errand = Errand("prepare", task.round, {"task": type(task).__name__}, parts)
        errands = {client: self._with_model(client, errand) for client in clients}
        said = self.post.ask(errands, self.members)
        lost = {c: replace(errand, parts={"model": self.model, **parts}) for c, s in said.items() if _lacks(s)}
        said |= self.post.ask(lost, self.members) if lost else {}
        for client in clients:
            answer = said[client]
            try:
                if isinstance(answer, str):
                    raise Malformed(answer)
                yield task.answer(preparation, answer.payload)
            except (Malformed, PayloadError) as error:
                log.warning("client %d is left out of the preparation: %s", client, error)
                yield None

    def _with_model(self, client: int, errand: Errand) -> Errand:
        """Add the first model, if the client does not hold it."""
        if client in self.holders:
            return errand
        self.holders.add(client)
        return replace(errand, parts={"model": self.model, **errand.parts})

    def take_part(self, round: Round, clients: Clients, cohorts: Iterable[Cohort]) -> None:
        """Have the clients of an open round train at their nodes, and take in their updates in the order of the plan.

        So sums round as in the simulator, whoever is the fastest.
        """
        asked = self._capped([cohort for cohort in cohorts if max(cohort.clients) != PADDING])
        errands = {cohort.clients[0]: self._training(round, cohort) for cohort in asked}
        said = self.post.ask(errands, self.members)
        lost = [cohort for cohort in asked if _lacks(said[cohort.clients[0]])]
        if lost:
            again = {cohort.clients[0]: self._training(round, cohort, everything=True) for cohort in lost}
            extra = sum(len(part) for errand in again.values() for part in errand.parts.values())
            round.federation.ledger.setup(1, up=0, down=extra)
            said |= self.post.ask(again, self.members)
        for cohort in asked:
            take_in(round, cohort, said[cohort.clients[0]])

    def evaluate(self, federation: Federation) -> tuple[Pairs, Pairs]:
        """Have all clients evaluate their own models of the round that has closed, on test and validation split.

        These messages are no part of the training, and the ledger does not count them.
        """
        errands = {client: self._evaluation(federation, client) for client in self.members}
        said = self.post.ask(errands, self.members)
        lost = {c: self._evaluation(federation, c, everything=True) for c, one in said.items() if _lacks(one)}
        said |= self.post.ask(lost, self.members) if lost else {}
        found: tuple[Pairs, Pairs] = ({}, {})
        for client in sorted(said):
            for name, pairs in zip(("test", "val"), found, strict=True):
                if (pair := _pair(said[client], name)) is not None:
                    pairs[client] = pair
        return found

    def _evaluation(self, federation: Federation, client: int, everything: bool = False) -> Errand:
        """Write what a client is sent to evaluate its own model: the whole row, as it keeps what it trained from."""
        (group,) = federation.topology.group([client])
        if everything or client not in federation.ledger.has_model:
            down = federation.bytes.messages(federation, client, group, everything=True)
        else:
            down = federation.bytes.whole(federation, client, group)
        return Errand("evaluate", federation.closed, self._state(federation, client, group), down._asdict())

    def _state(self, federation: Federation, client: int, group: int) -> dict[str, Any]:
        """Describe what a client holds: the round it trained in last, and those whose updates were left out."""
        return {
            "holds": federation.bytes.downlinks[group].holds.get(client, -1),
            "refused": sorted({drop.round for drop in federation.dropped if drop.client == client}),
            "implied": federation.bytes.prunes,
        }

    def _capped(self, cohorts: Sequence[Cohort]) -> list[Cohort]:
        """Limit each client's weight to its share of the round's."""
        weights = capped([cohort.weight[0] for cohort in cohorts], self.max_share)
        return [replace(cohort, weight=(weight,)) for cohort, weight in zip(cohorts, weights, strict=True)]

    def _training(self, round: Round, cohort: Cohort, everything: bool = False) -> Errand:
        """Write what a client is sent in a round."""
        federation, (client,) = round.federation, cohort.clients
        (group,) = federation.topology.group([client])
        down = federation.bytes.messages(federation, client, group, everything)
        fields = self._state(federation, client, group) | {"weight": cohort.weight[0]}
        return Errand("train", round.number, fields, down._asdict())


def take_in(round: Round, cohort: Cohort, said: Said) -> None:
    """Take a client's answer in, or record why it does not count."""
    try:
        round.receive(cohort, payload_of(round, cohort, said))
    except (Malformed, PayloadError) as error:
        round.miss(cohort, str(error))


def payload_of(round: Round, cohort: Cohort, said: Said) -> Payload:
    """Build what a round receives of a client's message.

    Raises:
        Malformed: there is no message; its text is the reason.
        PayloadError: the message is damaged.

    """
    if isinstance(said, str):
        raise Malformed(said)
    if LACKS in said.fields:
        raise Malformed(f"it has lost {str(said.fields[LACKS])[:100]}")
    if "refused" in said.fields:
        raise Malformed(str(said.fields["refused"])[:300])
    federation, like = round.federation, round.federation.server.values
    group = federation.topology.group(cohort.clients)
    planned = sum(count > 0 for step in cohort.count for count in step)
    steps, clipped = (_bounded(said.fields.get(key), planned) for key in ("local_steps", "clipped"))
    expected = Update(
        cohort.clients,
        like.new_zeros(1, like.shape[1]),
        like.new_zeros(1, federation.buffers.size, dtype=federation.buffers.values.dtype),
        cohort.weight,
        (0.0,),
        start=federation.server.broadcast(group),
        round=cohort.round,
        variates=like.new_zeros(1, like.shape[1]) if federation.objective.messages else None,
        local_steps=steps,
        clipped=clipped,
    )
    try:
        size = split_size(said.payload)
    except (struct.error, KeyError):
        raise PayloadError("header", f"{len(said.payload)} bytes begin no message of fedsparse") from None
    return Payload(expected, (size,), written=(said.payload,))


def _pair(said: Said, name: str) -> tuple[float, float] | None:
    """Read accuracy and loss of a split from an answer; None without."""
    pair = said.fields.get(name) if isinstance(said, Answer) else None
    numbers = isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, int | float) for one in pair)
    return (float(pair[0]), float(pair[1])) if numbers else None  # type: ignore[index]


def _bounded(value: Any, most: int) -> int:
    """Read a count that a client states, of at most so many; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else 0


def _lacks(said: Said) -> bool:
    """Whether a client has asked for the first model."""
    return isinstance(said, Answer) and said.fields.get(LACKS) == "model"


def capped(weights: Sequence[float], share: float) -> list[float]:
    """Limit weights so that none has more than a share of their sum; what is impossible gives equal weights.

    >>> capped([1.0, 1.0, 8.0], 0.5)
    [1.0, 1.0, 2.0]
    """
    if share >= 1 or not weights:
        return list(weights)
    if share * len(weights) <= 1:
        return [min(weights)] * len(weights)
    left = sorted(weights)
    for place in range(len(left)):  # the largest ones are equal: k of them at c = share / (1 - k share) of the others
        k = len(left) - place
        others = sum(left[:place])
        if k * share < 1 and left[place] * (1 - k * share) >= share * others:
            most = share * others / (1 - k * share)
            return [min(weight, most) for weight in weights]
    return list(weights)
