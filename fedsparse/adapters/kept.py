"""What a finished run keeps of its adapters: the models of departments and clients after the rounds that are stored.

Shapes: G global rows, P coordinates of the space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.adapters.base import Base, Network, digest
from fedsparse.core.folder import BEST, CHECKPOINTS, LAST, PREVIOUS, SUMMARY, TRAJECTORY, WEIGHTS
from fedsparse.core.folder import store as store_file
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.core.weights import load_weights
from fedsparse.federation.client.training import LOCAL
from fedsparse.federation.stores.store import stored_rows
from fedsparse.federation.trajectory import read_rounds, read_row
from fedsparse.job.assemble import assemble
from fedsparse.job.config import register_resolvers
from fedsparse.job.finished import check_finished
from fedsparse.job.parts import Assembly
from fedsparse.job.resume import read_job
from fedsparse.models.lora import Setting, settings
from fedsparse.simulation.checkpoint import read_checkpoint, renewed
from fedsparse.simulation.origin import Origin, model_of

ONE = "global"  # the only department's name
CHECKED = (LAST, PREVIOUS, BEST)  # checkpoints, in the order in which a round is looked for


@dataclass(frozen=True)
class Model:
    """A model of a run: a department's, or a client's own.

    Attributes:
        name: such as ``global``, ``department_0`` or ``client_3``.
        row: (P,).
        department: whose global model it is, or from whose model it started.
        client: None of a department's.

    """

    name: str
    row: Tensor
    department: str
    client: int | None = None


@dataclass(frozen=True)
class Moment:
    """All models after a round.

    Attributes:
        round: rounds closed; 0 is the network as built.
        models: of the departments, then of the clients that keep something.
        changed: frozen tensors that differ from those that were built (FLoRA and FedEx merge into them), by name.

    """

    round: int
    models: Sequence[Model]
    changed: Mapping[str, Tensor] = field(repr=False)

    @property
    def departments(self) -> list[Model]:
        """Models of the departments."""
        return [model for model in self.models if model.client is None]

    def chosen(self, departments: Sequence[str] | None = None, clients: Sequence[int] | None = None) -> list[Model]:
        """Choose models; None for both: all, and None for one: none of these.

        Raises:
            ValueError: there is no such department, or the client keeps nothing; says which there are.

        """
        if departments is None and clients is None:
            return list(self.models)
        shared = {model.department: model for model in self.departments}
        own = {model.client: model for model in self.models if model.client is not None}
        for name in departments or ():
            if name not in shared:
                raise ValueError(f"there is no department {name}; the run has {', '.join(shared)}")
        for client in clients or ():
            if client not in own:
                there = f"after round {self.round} these do: {', '.join(map(str, own))}" if own else "no client does"
                raise ValueError(f"client {client} keeps no model of its own; {there}")
        return [*(shared[name] for name in departments or ()), *(own[client] for client in clients or ())]


@dataclass(frozen=True)
class Kept:
    """A finished run with adapters.

    Attributes:
        folder: the run folder.
        assembly: its parts; the network is as built until ``load`` is called.
        choices: option chosen of each config group.
        base: the network without adapters.
        settings: of the adapters, by layer.
        start: (P,), the network as built.
        last: rounds of the run.

    """

    folder: Path
    assembly: Assembly
    choices: Mapping[str, str]
    base: Base
    settings: Mapping[str, Setting]
    start: Tensor
    last: int

    @classmethod
    def of(cls, folder: Path, trusted: Sequence[str] = ()) -> Kept:
        """Read a run folder.

        Args:
            folder: of a finished run.
            trusted: names of packages whose code the run may name.

        Raises:
            ValueError: there is no finished run, it has no adapters, PEFT is missing, or models differ in buffers.

        """
        if not folder.is_dir():
            raise ValueError(f"there is no run folder {folder}; give the folder that a run printed")
        register_resolvers()  # for a program of one's own: the commands have done it
        check_finished(folder)
        job = read_job(folder, trusted=trusted)
        assembly = assemble(job.cfg)
        problem = assembly.problem
        if assembly.method.regrouping is not None:
            raise ValueError(
                f"clients of {folder} change models within departments (topology.clusters_within), of which none is a "
                "department's: fedsparse.weights reads the first of them"
            )
        if not problem.adapters:
            raise ValueError(f"the run {folder} has no adapters; train with lora=r8 or a method, such as method=fedit")
        _check_buffers(assembly)
        last = int(json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["rounds"])
        base = Base.of(problem.net, problem.adapters)
        return cls(folder, assembly, job.choices, base, settings(problem.net), problem.space.read(problem.net), last)

    @property
    def space(self) -> ParamSpace:
        """What trains."""
        return self.assembly.problem.space

    @property
    def departments(self) -> tuple[str, ...]:
        """Names of the departments, of which each has a global model; ``global`` if there is one."""
        topology, problem = self.assembly.method.topology, self.assembly.problem
        if topology.groups == 1:
            return (ONE,)
        named = problem.departments and topology.group(range(len(problem.parts))) == problem.departments
        known = problem.dataset.department_names if named else ()
        return known or tuple(f"department_{group}" for group in range(topology.groups))

    def members(self, department: str) -> list[int]:
        """List the clients of a department."""
        clients = range(len(self.assembly.problem.parts))
        group = self.departments.index(department)
        return [c for c, of in zip(clients, self.assembly.method.topology.group(clients), strict=True) if of == group]

    def rank_of(self, model: Model) -> int | None:
        """Find the rank of a model's adapters, of a department the largest of its clients; None if all have one."""
        ranks = self.assembly.method.ranks
        clients = self.members(model.department) if model.client is None else [model.client]
        return max(ranks[client] for client in clients) if ranks else None

    @property
    def rounds(self) -> dict[int, Path]:
        """Files that hold the models after a round, by round; every checkpoint is read."""
        found = self._tables
        for name in reversed(CHECKED):  # of one round the first is chosen
            if (state := self._checkpoint(name)) is not None:
                found[int(state["epoch"]) + 1] = self.folder / CHECKPOINTS / name
        return dict(sorted(found.items()))

    def at(self, round: int | None = None) -> Moment:
        """Read all models after a round; None: the last one, 0: as built.

        Raises:
            ValueError: they were not kept, or a file is missing or damaged; one line.

        """
        number = self.last if round is None else round
        if number == 0:
            return Moment(0, self._models(self.start.repeat(len(self.departments), 1)), {})
        if number == self.last and self._one:
            return self._from_rows(number, self.folder / WEIGHTS)
        for name in CHECKED:
            state = self._checkpoint(name)
            if state is not None and int(state["epoch"]) + 1 == number:
                return self._from_checkpoint(number, state)
        if number not in self._tables:
            kept = ", ".join(map(str, self.rounds)) or "none"
            alone = "" if self._one else "; checkpoints alone hold those of departments, and what clients keep"
            raise ValueError(f"{self.folder} keeps no models after round {number}; it keeps those after {kept}{alone}")
        return self._from_rows(number, self._tables[number])

    @property
    def _one(self) -> bool:
        """Whether a round has one model, which the run's weights or a row of the trajectory are."""
        return len(self.departments) == 1 and not bool(self.space.local.any())

    @property
    def _tables(self) -> dict[int, Path]:
        """Files other than checkpoints that hold all models of a round: the trajectory, and the weights at the end."""
        path = self.folder / TRAJECTORY
        if not self._one:
            return {}
        found = {closed: path for closed in read_rounds(path) if closed} if path.is_file() else {}
        return {**found, self.last: self.folder / WEIGHTS}

    @cached_property
    def _network(self) -> Network:
        return Network(self.assembly.problem.net, self.space)

    def load(self, moment: Moment, model: Model) -> nn.Module:
        """Load a model into the run's network, which is returned in evaluation mode; the next call replaces it."""
        return self._network.load(model.row, moment.changed)

    def _checkpoint(self, name: str) -> dict[str, Any] | None:
        """Read a checkpoint; None if it is missing, or refers to slots of a file that may be other rounds' by now."""
        path = self.folder / CHECKPOINTS / name
        if not path.is_file():
            return None
        state = renewed(read_checkpoint(path, self.space))
        slots = state["callbacks"]["FederatedRounds"]["stores"][LOCAL].get("slots")
        return None if name == BEST and slots else state

    def _from_checkpoint(self, number: int, state: Mapping[str, Any]) -> Moment:
        """Take the rows of a checkpoint, and what its clients keep."""
        self._network.load(self.start, {})  # as built, which is what a checkpoint leaves out
        tensors = model_of(Origin.of(self.assembly.problem.net, self.space), state)
        federation = state["callbacks"]["FederatedRounds"]
        subspace, others = Subspace(state["state_dict"]["mask"]), federation["server"]["rows"]
        rows = self._row(tensors).repeat(len(self.departments), 1)
        if len(rows) > 1:  # what does not train is equal in all: a checkpoint holds it or not
            subspace.write(rows[1:], others if others.shape[1] == subspace.size else subspace.of(others))
        marks = subspace.mask & self.space.local
        kept = stored_rows(federation["stores"][LOCAL], self.folder / store_file(LOCAL)) if bool(marks.any()) else {}
        return Moment(number, self._models(rows, marks, kept), self._changed(tensors))

    def _from_rows(self, number: int, path: Path) -> Moment:
        """Read the one global row of a trajectory, or the network that the run ended with."""
        tensors = load_weights(self.folder / WEIGHTS)
        row = self._row(tensors) if path.name == WEIGHTS else read_row(path, number).to(self.start.dtype)
        return Moment(number, self._models(row.unsqueeze(0)), self._changed(tensors))

    def _row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in self.space.names])

    def _changed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the frozen tensors that are no longer as built."""
        frozen = {name: tensor for name, tensor in tensors.items() if name not in self.space.names}
        known = self.base.digests
        return {n: t for n, t in frozen.items() if (plain := self.base.plain(n)) in known and digest(t) != known[plain]}

    def _models(
        self, rows: Tensor, marks: Tensor | None = None, kept: Mapping[int, Tensor] | None = None
    ) -> list[Model]:
        """Name the models: global rows (G, P), and what clients keep of the marked coordinates, bool (P,)."""
        found = [Model(name, row, name) for name, row in zip(self.departments, rows, strict=True)]
        for client, values in sorted((kept or {}).items()):
            (group,) = self.assembly.method.topology.group([client])
            row = rows[group].clone()
            row[marks] = values.to(row.dtype)
            found.append(Model(f"client_{client}", row, self.departments[group], client))
        return found


def _check_buffers(assembly: Assembly) -> None:
    """Refuse models that differ in float buffers, which no adapter has.

    Raises:
        ValueError: one line.

    """
    several = assembly.method.topology.groups > 1 or assembly.module().buffer_policy == "local"
    if several and ParamSpace.of_buffers(assembly.problem.net).size:
        raise ValueError(
            "the models of departments or clients differ in running statistics (BatchNorm), which an adapter does not "
            "hold; set federation.buffers=frozen and topology=flat, or take a model without BatchNorm"
        )
