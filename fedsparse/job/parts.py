"""The parts of a run, whole before training: the problem, the course of its rounds, the method, and all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.core.monitor import ACCURACY, PERSONAL_ACCURACY
from fedsparse.core.space import ParamSpace, Patterns
from fedsparse.core.weights import distinct
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.images import Inputs, TokenInputs
from fedsparse.data.phased import PhasedPlan
from fedsparse.data.rounds import RoundPlan
from fedsparse.federation.bytecount import PreparedHead
from fedsparse.federation.client.training import Clients
from fedsparse.federation.exchange.exchange import Exchange, OwnMasks
from fedsparse.federation.exchange.ledger import Link
from fedsparse.federation.exchange.wire.message import known_size
from fedsparse.federation.federation import Federation
from fedsparse.federation.phases import Phases
from fedsparse.federation.schedule import Schedule
from fedsparse.federation.server.aggregation import Aggregation
from fedsparse.federation.server.merging import Merging
from fedsparse.federation.server.mixing import Mixing
from fedsparse.federation.server.regrouping import Regrouping
from fedsparse.federation.server.server import MakeOptimizer
from fedsparse.federation.server.topology import Topology
from fedsparse.federation.trajectory import Trajectory
from fedsparse.masks import MaskRule, Sparsity
from fedsparse.models.lora import Adapter
from fedsparse.preparation.calibration import Calibration
from fedsparse.preparation.head import Head
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.origin import Origin
from fedsparse.simulation.trainer import Session

MakeExchange = Callable[[Tensor, OwnMasks], Exchange]


@dataclass(frozen=True)
class Problem:
    """The learning problem: data, its partition over clients, and the model.

    Attributes:
        dataset: the splits.
        parts: sample indices of every client.
        tests: indices into the test split, of every client.
        vals: indices into the validation split, of every client; empty where nothing stays with the clients.
        net: the network, with its initial weights.
        space: its federated tensors.
        head: patterns of the head's parameters.
        inputs: converts samples to the network's inputs.
        arguments: of the network's builder, plain values.
        precision: ``trainer.precision``.
        batch_size: samples of a local step.
        seed: the run's seed.
        adapters: of the network, by layer.
        departments: of each client, from 0, as the data names them; empty if it names none.
        truth: cluster of each of these departments, as the data names it; empty if it names none.

    """

    dataset: Dataset
    parts: Sequence[np.ndarray]
    tests: Sequence[np.ndarray]
    vals: Sequence[np.ndarray]
    net: nn.Module
    space: ParamSpace
    head: Patterns
    inputs: Inputs | TokenInputs
    arguments: dict[str, Any]
    precision: str
    batch_size: int
    seed: int
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    departments: tuple[int, ...] = ()
    truth: tuple[int, ...] = ()

    @property
    def eligible(self) -> list[int]:
        """Clients that hold data."""
        return [client for client, part in enumerate(self.parts) if len(part)]

    @property
    def monitor(self) -> str:
        """Name the accuracy of validation that chooses rounds: that of the clients' own models, where they have one."""
        return PERSONAL_ACCURACY if any(len(part) for part in self.vals) else ACCURACY

    def truth_of(self, topology: Topology) -> tuple[int, ...]:
        """Give the true cluster of each group of a topology; empty if its groups are not the data's departments."""
        clients = range(len(self.parts))
        return self.truth if self.departments and topology.group(clients) == self.departments else ()

    @property
    def dealt(self) -> Split:
        """The training samples that clients hold, each once."""
        train, parts = self.dataset.train, [np.asarray(part, dtype=np.int64) for part in self.parts]
        index = torch.from_numpy(np.unique(np.concatenate(parts)))
        return train if len(index) == len(train.y) else Split(train.x[index], train.y[index])

    @property
    def model_length(self) -> int:
        """Bytes of a message of all parameters and float buffers, trained or not: the first download."""
        tensors = [tensor for tensor in distinct(self.net.state_dict()) if tensor.is_floating_point()]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return known_size(sum(tensor.numel() for tensor in tensors), 0, dtype).total


@dataclass(frozen=True)
class Course:
    """The plan of all rounds: which clients take part, and how many local steps they take.

    Attributes:
        phases: of the run.
        plan: cohorts of a learning round, without a phase's options.
        phased: cohorts of every round, by phase.
        sample: draws the clients of a round, for a purpose.
        measured: whether K is measured before training.

    """

    phases: Phases
    plan: RoundPlan
    phased: PhasedPlan
    sample: Callable[..., Sequence[int]]
    measured: bool

    @property
    def cohort(self) -> int:
        """K, the clients of a cohort."""
        return self.plan.cohort_size(len(self.plan.sample(0)))

    def bounded(self, bound: int) -> Course:
        """Copy the plan with cohorts of at most ``bound`` clients."""
        plan = self.plan.bounded(bound)
        return replace(self, plan=plan, phased=PhasedPlan(self.phased.stages, plan))

    @property
    def clients(self) -> int:
        """Number of clients of the smallest learning round."""
        stages = zip(self.phases.rounds, self.phased.stages, strict=True)
        return min(len(plan.sample(0)) for phase, (_, plan, _) in stages if not phase.explores)


@dataclass(frozen=True)
class Method:
    """The method of a run: mask, clients, exchange, server.

    Attributes:
        rule: scores coordinates for the mask.
        sparsity: how many coordinates train.
        own_masks: whether every client has a mask of its own, from its own data.
        ranks: of each client's adapters; empty if all have one.
        head: initialisation of the head.
        calibration: options of the measurement of scores.
        make_module: builds K clients of a network; all coordinates train until a mask is set.
        make_exchange: builds the exchange of the trained coordinates, bool (P,), and the clients' own masks.
        aggregation: averages updates to one change.
        topology: assigns clients to global rows.
        mixing: mixes the rows of groups; None: they stay apart.
        regrouping: assigns clients to groups of their departments between rounds; None: they stay where they are.
        merging: builds what merges adapters into the frozen weights of a network; None: these stay.
        make_server: builds the server's optimizer.
        untouched: treatment of coordinates that no client sent; see ``Server``.
        schedule: factor of the clients' learning rate, by round.
        trajectory: builds the store of global rows over time; None: they are not stored.
        link: bandwidth and latency between client and server; None: time is not modelled.
        store: where client state lies between rounds, ``memory`` or ``file``.

    """

    rule: MaskRule
    sparsity: Sparsity
    own_masks: bool
    ranks: tuple[int, ...]
    head: Head
    calibration: Calibration
    make_module: Callable[[nn.Module, int], ClientModule]
    make_exchange: MakeExchange
    aggregation: Aggregation
    topology: Topology
    mixing: Mixing | None
    regrouping: Regrouping | None
    merging: Callable[[nn.Module], Merging] | None
    make_server: MakeOptimizer
    untouched: str
    schedule: Schedule
    trajectory: Callable[..., Trajectory] | None
    link: Link | None
    store: str

    @property
    def apart(self) -> bool:
        """Whether clients train different coordinates."""
        return self.own_masks or bool(self.ranks)

    @property
    def changes(self) -> bool:
        """Whether the mask changes during training."""
        return not self.sparsity.constant

    def federate(self, exchange: Exchange, phases: Phases, **given: Any) -> Callable[[Clients], Federation]:
        """Build the constructor of the federation, which takes the clients.

        Args:
            exchange: of the trained coordinates.
            phases: of the run.
            given: other arguments of ``Federation``: choice, store, ledger, traffic, watchers.

        """
        return partial(
            self._federation,
            exchange=exchange,
            aggregation=self.aggregation,
            topology=self.topology,
            mixing=self.mixing,
            regrouping=self.regrouping,
            make_server=self.make_server,
            untouched=self.untouched,
            phases=phases,
            schedule=self.schedule,
            **given,
        )

    def _federation(self, clients: Clients, **given: Any) -> Federation:
        """Build the federation; what merges adapters changes the frozen weights of the clients' own network."""
        return Federation(clients, merging=None if self.merging is None else self.merging(clients.net), **given)


@dataclass(frozen=True)
class Assembly:
    """The parts of a run, complete before training.

    Attributes:
        problem: data and model.
        course: the plan of all rounds.
        method: mask, clients, exchange, server.
        session: options of training, checkpoints and logging on this machine.
        make_data: builds the data module of a data set, a plan, and the clients' test and validation parts.
        config: the configuration as plain values, for loggers, cache keys, and what a message says as it was typed.
        pictures: whether figures are drawn.
        keep_deviation: whether the deviation observed in an exploration is saved.

    """

    problem: Problem
    course: Course
    method: Method
    session: Session
    make_data: Callable[..., FederatedDataModule]
    config: dict[str, Any]
    pictures: bool
    keep_deviation: bool

    def datamodule(self, **given: Any) -> FederatedDataModule:
        """Build the loaders of cohorts and splits; ``given`` are other options of ``FederatedDataModule``."""
        problem = self.problem
        return self.make_data(problem.dataset, self.course.phased, problem.tests, vals=problem.vals, **given)

    def module(self) -> ClientModule:
        """Build the clients of the run's cohorts."""
        return self.method.make_module(self.problem.net, self.course.cohort)

    def prepared_head(self, mask: Tensor) -> PreparedHead | None:
        """Describe the prepared head, where rounds that train a mask, bool (P,), do not bring all of it; else None."""
        problem, head, names = self.problem, self.method.head, self.problem.head
        stays = head.frozen or bool((problem.space.where(names) & ~(mask & ~problem.space.local)).any())
        if head.init == "random" or not (stays or head.init == "closed_form"):
            return None
        return PreparedHead(names, counted=head.init == "closed_form")

    def origin(self, module: ClientModule) -> Origin:
        """Take the network as it has just been built; its head may still be fitted, and frozen buffers stay."""
        problem, frozen = self.problem, module.buffer_policy == "frozen"
        return Origin.of(problem.net, problem.space, problem.head, buffers=frozen)
