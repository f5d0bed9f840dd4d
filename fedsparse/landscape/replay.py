"""The models of a run at the end of a round: the global row, and that of every client, trained again.

A client's batches are a pure function of (seed, round, client), so it is trained again from the global row before the
round, whether it took part or not: no local model is ever stored. At K = 1 it gets the bits that it had in the run,
from ``last.previous.ckpt`` or from a trajectory in the run's own precision.

Shapes: P coordinates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsparse.core.folder import CHECKPOINTS, CLIENT_MASKS, MASK, PREVIOUS, SUMMARY, TRAJECTORY, WEIGHTS
from fedsparse.core.folder import store as store_file
from fedsparse.core.precisions import HALF
from fedsparse.core.weights import load_weights
from fedsparse.federation.client.training import LOSS_SCALE, Clients
from fedsparse.federation.federation import Federation
from fedsparse.federation.stores.store import stored_rows
from fedsparse.federation.trajectory import client_file, read_rounds, read_row
from fedsparse.job.assemble import assemble
from fedsparse.job.config import register_resolvers
from fedsparse.job.finished import check_finished
from fedsparse.job.parts import Assembly, Problem
from fedsparse.job.resume import read_job
from fedsparse.masks import Mask
from fedsparse.models.copies import copied
from fedsparse.simulation.checkpoint import read_checkpoint, renewed
from fedsparse.simulation.devices import device_of
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.origin import Origin
from fedsparse.simulation.trainer import as_trained


@dataclass(frozen=True)
class Models:
    """A run's models at the end of a round.

    Attributes:
        folder: the run folder.
        assembly: the parts of the run; the network holds the last global model.
        last: rounds of the run.
        round: rounds closed.
        global_row: (P,).
        mask: bool (P,), what trained last.
        start: (P,), the network as it was built, before its head saw data.

    """

    folder: Path
    assembly: Assembly
    last: int
    round: int
    global_row: Tensor
    mask: Tensor
    start: Tensor

    def at(self, round: int) -> Models:
        """Take the models of another round.

        Raises:
            ValueError: its row was not kept.

        """
        if round == self.round:
            return self
        if round == self.last:
            return replace(self, round=round, global_row=self.assembly.problem.space.read(self.assembly.problem.net))
        return replace(self, round=round, global_row=kept_row(self.folder, round).to(self.global_row.dtype))


def load(folder: Path, round: int | None = None, trusted: Sequence[str] = ()) -> Models:
    """Read the global model of a finished run.

    Args:
        folder: the run folder.
        round: rounds closed; None: all of them. An earlier one needs the run's ``trajectory=global``.
        trusted: names of packages whose code it may name.

    Raises:
        ValueError: the run is not finished, the row was not kept, or the mask is of another model.

    """
    register_resolvers()  # for a program of one's own: the commands have done it
    check_finished(folder)
    assembly = assemble(read_job(folder, trusted=trusted).cfg)
    problem, closed = assembly.problem, int(json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["rounds"])
    start = problem.space.read(problem.net)
    problem.net.load_state_dict(load_weights(folder / WEIGHTS))
    mask, row = Mask.load(folder / MASK).row(problem.space), problem.space.read(problem.net)
    models = Models(folder, assembly, closed, closed, row, mask, start)
    return models if round is None else models.at(round)


def check_frozen(assembly: Assembly, folder: Path) -> None:
    """Refuse a run whose frozen weights change, so that a row does not say which model it is.

    Raises:
        ValueError: one line.

    """
    if assembly.method.merging is not None:
        raise ValueError(
            f"{folder} merges adapters into frozen weights after each round (method=flora, fedex), so that the models "
            "of two rounds differ in more than what trains: no line or plane joins them"
        )


def local_row(models: Models, client: int) -> Tensor:
    """Read a client's row (P,) of the round that ends with ``models``, or train it again; on the CPU.

    Raises:
        ValueError: no such client, one without data, what it started from is not kept, or frozen weights change.

    """
    check_frozen(models.assembly, models.folder)
    assembly, number = models.assembly, models.round - 1
    check_client(assembly.problem, client)
    if assembly.course.phases.explores(number):
        raise ValueError(f"clients explore in round {models.round}, and end it without a model; take a later round")
    stored = client_file(models.folder / TRAJECTORY, client)
    if stored.is_file() and models.round in read_rounds(stored):
        return read_row(stored, models.round).to(models.global_row.dtype)
    federation, clients = _before(models)
    plan, number_of_kind = assembly.course.phased.at(number)
    cohort, round = plan.cohort_of(number_of_kind, client).to(clients.theta.device), federation.open(number)
    with as_trained(assembly.session):
        update = clients.train(round.send(cohort), cohort)
    assert update.values is not None
    row = federation.server.rows[0].clone()
    federation.server.subspace.write(row, update.values[0])
    return row.cpu()


def check_client(problem: Problem, client: int) -> None:
    """Refuse a client that does not exist or holds no data.

    Raises:
        ValueError: one line.

    """
    count = len(problem.parts)
    if not 0 <= client < count:
        raise ValueError(f"client:{client} is none of the {count} clients, 0 to {count - 1}")
    if not len(problem.parts[client]):
        raise ValueError(f"client:{client} holds no data, so that it has neither a model nor a loss of its own")


def _before(models: Models) -> tuple[Federation, Clients]:
    """Build the federation as it was before the round, on a copy of the network, for one client at a time."""
    assembly, closed = models.assembly, models.round - 1
    method, session = assembly.method, assembly.session
    module = method.make_module(copied(assembly.problem.net), 1)
    state = _checkpoint(models)
    if state is not None:
        assembly.problem.space.write(module.net, models.start)
        origin = Origin.of(module.net, assembly.problem.space)
        origin.check(state)
        state = origin.whole(state)
        module.bitmaps = state["state_dict"]["bitmaps"]
        module.load_state_dict(state["state_dict"])
    else:
        _check_stateless(models, module)
        assembly.problem.space.write(module.net, kept_row(models.folder, closed))
        path = models.folder / CLIENT_MASKS
        module.set_mask(models.mask, load_file(path)["bitmaps"] if path.is_file() else None)
    device, data = device_of(session.accelerator), assembly.datamodule()
    module.to(device).train()
    clients = module.form(data.to(device).fetch, LOSS_SCALE if session.precision == HALF else 1.0)
    exchange = method.make_exchange(torch.as_tensor(module.mask).cpu(), module.own_masks)
    federation = method.federate(exchange, assembly.course.phases, count_bytes=False)(clients)
    if state is not None:
        found = state["callbacks"]["FederatedRounds"]
        kept = {name: stored_rows(of, models.folder / store_file(name)) for name, of in found["stores"].items()}
        federation.load_state_dict(found | {"stores": {name: {"rows": rows} for name, rows in kept.items()}})
    return federation, clients


def _checkpoint(models: Models) -> dict[str, Any] | None:
    """Read the checkpoint of the round before; None where it is not kept."""
    path = models.folder / CHECKPOINTS / PREVIOUS
    if not path.is_file():
        return None
    state = renewed(read_checkpoint(path, models.assembly.problem.space))
    return state if state["epoch"] + 1 == models.round - 1 else None


def kept_row(folder: Path, closed: int) -> Tensor:
    """Read the global row (P,) after so many rounds from the trajectory.

    Raises:
        ValueError: none was kept, or not this one; says what would keep it.

    """
    path = folder / TRAJECTORY
    if not path.is_file():
        raise ValueError(
            f"{folder} keeps no global model after {closed} rounds; a run with trajectory=global keeps each round's"
        )
    return read_row(path, closed).float()


def _check_stateless(models: Models, module: ClientModule) -> None:
    """Refuse clients that keep something between rounds, which a trajectory does not hold.

    Raises:
        ValueError: names what is kept.

    """
    kept = {
        "objective=scaffold (control variates)": module.objective.messages > 0,
        "model.local (coordinates that stay with the client)": bool(module.space.local.any()),
        "federation.buffers=local (its statistics)": module.buffer_policy == "local",
        "masks that change": models.assembly.method.changes,
    }
    held = [name for name, there in kept.items() if there]
    if held:
        raise ValueError(
            f"clients of {models.folder} cannot be trained again in round {models.round}: {', '.join(held)}; take the "
            "last round, of which the checkpoint before it is kept, or keep them with trajectory.clients=[0]"
        )
