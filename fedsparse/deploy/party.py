"""One client of a run: the parts that the simulator has for all clients, here for one.

Shapes: P coordinates, n of them train, m of which travel; Q float-buffer values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsparse.core.precisions import HALF, dtype_of, made_in
from fedsparse.core.space import parameters_of
from fedsparse.federation.client.training import LOSS_SCALE
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.exchange.wire.message import decode_mask, read
from fedsparse.federation.exchange.wire.model import read_model
from fedsparse.federation.masking import zero
from fedsparse.federation.server.topology import Flat
from fedsparse.federation.stores.store import MemoryStore
from fedsparse.job.parts import Assembly
from fedsparse.job.prepare import build_preparation
from fedsparse.masks import Thinning
from fedsparse.preparation.preparation import Preparation
from fedsparse.preparation.tasks import (
    ClientTask,
    HeadGradient,
    HeadStatistics,
    Observation,
    left_of,
    load,
)
from fedsparse.simulation.copied import Batches, CopiedNet
from fedsparse.simulation.devices import fabric_of, kernels
from fedsparse.simulation.own_models import scored


@dataclass(frozen=True)
class Trained:
    """What a client has to say of a round.

    Attributes:
        message: its update, as it travels.
        fields: local steps, and those whose gradient was clipped; or why there is no update.

    """

    message: bytes
    fields: Mapping[str, object]


class Party:
    """A client with its data and network, ready for the messages of its run.

    Args:
        make: assembles the run, with the client's data.
        client: its id.

    Attributes:
        samples: that it holds.

    """

    def __init__(self, make: Callable[[], Assembly], client: int) -> None:
        self.make, self.client, self.assembly = make, client, make()
        problem = self.assembly.problem
        self.samples = len(problem.parts[client]) if client < len(problem.parts) else 0
        self.fabric = fabric_of(self.assembly.session.accelerator, self.assembly.session.precision)
        self.module = self.assembly.module()
        self.preparation = self._preparation()

    def anew(self) -> Party:
        """Build the client again, with the network as it was built first."""
        return Party(self.make, self.client)

    def _preparation(self) -> Preparation:
        """Build what tasks before the first round read; the network moves to its device."""
        with made_in(dtype_of(self.assembly.problem.precision)):
            return build_preparation(self.assembly, self.module, Ledger())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Choose dtype and kernels as a run does."""
        session = self.assembly.session
        with made_in(dtype_of(self.assembly.problem.precision)), kernels(session.deterministic, session.tf32):
            yield

    def load(self, model: bytes) -> None:
        """Load the first model, from a message before the first round.

        Raises:
            PayloadError: it is damaged, or another network's.

        """
        read_model(model, self.assembly.problem.net, self.assembly.problem.space)

    def prepare(self, name: str, round: int, parts: Mapping[str, bytes]) -> bytes:
        """Run a task before the first round: the message.

        Args:
            name: of the task.
            round: step or calibration round.
            parts: what the server sent for it, in order.

        Raises:
            PayloadError: a message is damaged.
            ValueError: an unknown task.

        """
        given = list(parts.values())
        task = self._task(name, round, given)
        with self.computing(), task.received(self.preparation, given):
            return task.up(task.run(self.preparation, self.client))

    def _task(self, name: str, round: int, given: list[bytes]) -> ClientTask:
        problem, method = self.assembly.problem, self.assembly.method
        if name == HeadGradient.__name__:
            return HeadGradient(problem.head, round)
        if name == HeadStatistics.__name__:
            return HeadStatistics(problem.head, round)
        if name != Observation.__name__:
            raise ValueError(f"{name[:40]!r} is no task of a client")
        kind, left = method.rule.calibration, left_of(given, problem.space.size)
        shrink = kind.shrink if isinstance(kind, Thinning) else 1.0
        return Observation(method.rule, problem.head, round, method.calibration.batches, left, shrink)

    def learner(self, model: bytes, mask: bytes, implied: bool, head: bytes) -> Learner:
        """Build the client as it trains.

        Args:
            model: the first model.
            mask: the mask; empty if everything trains.
            implied: whether the model has only what the mask trains, and zeros elsewhere.
            head: the prepared head, where rounds do not bring it; else empty.

        Raises:
            PayloadError: a message is damaged.

        """
        problem, net, space = self.assembly.problem, self.assembly.problem.net, self.assembly.problem.space
        row = decode_mask(mask, space.size) if mask else torch.ones(space.size, dtype=torch.bool)
        read_model(model, net, space, row if implied else None)
        if head:
            load(parameters_of(net, problem.head), head)
        if self.assembly.method.sparsity.mode == "prune":
            zero(net, space, row)
        with self.computing():
            return Learner(self, row)


class Learner:
    """A client that trains: its share of a federation, without server and other clients.

    Args:
        party: the client.
        mask: bool (P,), the coordinates that train.

    Attributes:
        federation: with one global row, which holds what the server sent.
        travelling: bool (n,), trained coordinates that travel.

    """

    def __init__(self, party: Party, mask: Tensor) -> None:
        self.party = party
        assembly, module, fabric = party.assembly, party.module.train(), party.fabric
        method = replace(assembly.method, topology=Flat(), mixing=None, regrouping=None)
        module.set_mask(mask.to(torch.as_tensor(module.mask).device))
        module.to(fabric.device)
        module.keep_in(_in_memory)
        self.copied = CopiedNet(module.net)  # before its parameters become views of a row
        self.data = assembly.datamodule().to(fabric.device)
        scale = LOSS_SCALE if assembly.session.precision == HALF else 1.0
        clients = module.form(self.data.fetch, scale, fabric.autocast)
        exchange = method.make_exchange(mask, module.own_masks)
        exchange.keep_in(_in_memory)
        federate = method.federate(exchange, assembly.course.phases, store=MemoryStore(), count_bytes=False)
        self.clients, self.federation = clients, federate(clients)
        self.travelling = ~self.federation.server.subspace.of(assembly.problem.space.local.to(fabric.device))

    @property
    def keeps(self) -> bool:
        """Whether the client keeps rows between rounds."""
        federation = self.federation
        return self.clients.local is not None or bool(federation.exchange.stores or federation.objective.stores)

    @property
    def base(self) -> Tensor:
        """Values (m,) that the client started from last."""
        return self.federation.server.values[0][self.travelling].clone()

    def put(self, base: Tensor) -> None:
        """Set the values (m,) that the server's next message changes."""
        values = self.federation.server.values.clone()
        values[0, self.travelling] = base.to(values)
        self.federation.server.put(values)

    def receive(self, row: bytes, first: bool) -> None:
        """Take in the server's message of a round.

        Args:
            row: what changed, buffers, and what the drift correction sends; empty if there is nothing of these.
            first: whether it came with a model, which has values and buffers.

        Raises:
            PayloadError: it is damaged.

        """
        federation, base = self.federation, self.base
        if row:
            message = read(row, 0 if first else len(base), dtype=base.dtype)
            extra = message.buffers.to(base)
            if not first:
                self.put(torch.where(message.sent.to(base.device), message.values.to(base), base))
                buffers, extra = extra.split([federation.buffers.size, len(extra) - federation.buffers.size])
                federation.buffers.values[0, : federation.buffers.size] = buffers
            if len(extra):
                federation.objective.take(extra)

    def train(self, number: int, weight: float) -> Trained:
        """Train in a round, from 0, and keep what the client keeps."""
        plan, index = self.party.assembly.course.phased.at(number)
        cohort = plan.cohort_of(index, self.party.client).to(self.party.fabric.device)
        cohort = replace(cohort, weight=(weight,))
        with self.party.computing():
            round = self.federation.open(number)
            update = self.clients.train(round.send(cohort), cohort)
            payload = round.encode(update)
            if payload.update.refused:
                return Trained(b"", {"refused": payload.update.refused[0]})
            (message,) = self.federation.exchange.messages(payload)
            round.receive(cohort, payload)
        return Trained(message, {"local_steps": update.local_steps, "clipped": update.clipped})

    def evaluate(self) -> dict[str, tuple[float, float]]:
        """Evaluate the client's own model, the server's values with what it keeps, on its parts of the splits.

        Returns:
            Accuracy and loss of ``test`` and ``val``; none of a split of which it has no part.

        """
        federation, clients, client = self.federation, self.clients, self.party.client
        problem, values = self.party.assembly.problem, federation.server.values
        if clients.local is not None:
            values = federation.restored([client], values, clients.local)
        row = federation.server.rows[0].clone()
        federation.server.subspace.write(row, values[0])
        self.copied.load(self.party.module, row, clients.buffers.of(client, 0))
        splits = {"test": (problem.dataset.test, problem.tests), "val": (problem.dataset.val, problem.vals)}
        how = Batches(self.data.eval_batch_size, self.party.fabric.autocast)
        return {
            name: scored(self.copied, how, self.party.module, split, parts[client])
            for name, (split, parts) in splits.items()
            if client < len(parts) and len(parts[client])
        }

    def kept(self) -> dict[str, Tensor]:
        """Collect the rows that the client keeps between rounds, by the store's name."""
        nothing, found = torch.zeros(0), dict[str, Tensor]()
        for name, store in self.federation.stores.items():
            row = store.get(self.party.client, nothing)
            if row is not nothing:
                found[name] = row
        return found

    def keep(self, rows: Mapping[str, Tensor]) -> None:
        """Set the rows that the client keeps; a store that is not named has none."""
        for name, store in self.federation.stores.items():
            held = {self.party.client: rows[name]} if name in rows else {}
            store.load_state_dict({"rows": held})


def _in_memory(name: str) -> MemoryStore:
    return MemoryStore()
