"""The models of a run at the end of a round: the global row, and that of every client, trained again.

A client's batches are a pure function of (seed, round, client), so it is trained again from the global row before the
round, whether it took part or not: no local model is ever stored. With K = 1 and the state of ``last.previous.ckpt`` it
gets the bits that it had in the run.

Shapes: P coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.folder import CHECKPOINTS, CONFIG, LAST, PREVIOUS, SUMMARY, TRAJECTORY, WEIGHTS
from fedsparse.core.weights import load_weights
from fedsparse.federation.client.training import Clients
from fedsparse.federation.federation import Federation
from fedsparse.federation.trajectory import read_row
from fedsparse.job.assemble import Assembly, assemble
from fedsparse.job.resume import read_job
from fedsparse.simulation.checkpoint import read_checkpoint, renewed


@dataclass(frozen=True)
class Models:
    """A run's models at the end of a round.

    Attributes:
        folder: the run folder.
        assembly: the parts of the run; the network holds the last global model.
        round: rounds closed.
        global_row: (P,).
        mask: bool (P,), what trained last.

    """

    folder: Path
    assembly: Assembly
    round: int
    global_row: Tensor
    mask: Tensor


def load(folder: Path, round: int | None = None, trusted: Sequence[str] = ()) -> Models:
    """Read the global model of a finished run.

    Args:
        folder: the run folder.
        round: rounds closed; None: all of them. An earlier one needs the run's ``trajectory=global``.
        trusted: names of packages whose code it may name.

    Raises:
        ValueError: the run is not finished, or the row was not kept.

    """
    if not all((folder / name).is_file() for name in (SUMMARY, WEIGHTS, CONFIG)):
        raise ValueError(f"{folder} holds no finished run; python -m fedsparse.train resume={folder} finishes one")
    assembly = assemble(read_job(folder, trusted=trusted).cfg)
    problem, total = assembly.problem, assembly.course.phases.total
    problem.net.load_state_dict(load_weights(folder / WEIGHTS))
    mask = torch.as_tensor(_state(folder, assembly, LAST)["state_dict"]["mask"])
    row = problem.space.read(problem.net)
    if round is not None and round != total:
        row = _kept(folder, round).to(row.dtype)
    return Models(folder, assembly, total if round is None else round, row, mask)


def local_row(models: Models, client: int) -> Tensor:
    """Train a client again in the round that ends with ``models``: its row (P,).

    Raises:
        ValueError: no such client, one without data, or what it started from is not kept.

    """
    problem, number = models.assembly.problem, models.round - 1
    if not 0 <= client < len(problem.parts):
        raise ValueError(f"client:{client} is none of the {len(problem.parts)} clients, 0 to {len(problem.parts) - 1}")
    if not len(problem.parts[client]):
        raise ValueError(f"client:{client} holds no data, so that it has no model of its own")
    federation, clients = _before(models)
    course = models.assembly.course
    plan, number_of_kind = course.phased.at(number)
    cohort, round = plan.alone_in(number_of_kind, client), federation.open(number)
    update = clients.train(round.send(cohort), cohort)
    assert update.values is not None
    row = federation.server.rows[0].clone()
    federation.server.subspace.write(row, update.values[0])
    clients.release()
    return row


def _before(models: Models) -> tuple[Federation, Clients]:
    """Set the federation up as it stood before the round, for one client at a time."""
    folder, assembly, closed = models.folder, models.assembly, models.round - 1
    previous = _state(folder, assembly, PREVIOUS) if (folder / CHECKPOINTS / PREVIOUS).is_file() else None
    state = previous if previous is not None and previous["epoch"] + 1 == closed else None
    module = assembly.method.make_module(assembly.problem.net, 1)
    if state is None:
        _check_stateless(models)
        assembly.problem.space.write(module.net, _kept(folder, closed))
        module.set_mask(models.mask)
    else:
        module.bitmaps = state["state_dict"]["bitmaps"]
        module.load_state_dict(state["state_dict"])
    clients = module.form(assembly.datamodule().fetch)
    exchange = assembly.method.make_exchange(torch.as_tensor(module.mask).cpu(), module.own_masks)
    federation = assembly.method.federate(exchange, assembly.course.phases, count_bytes=False)(clients)
    if state is not None:
        federation.load_state_dict(state["callbacks"]["FederatedRounds"])
    return federation, clients


def _state(folder: Path, assembly: Assembly, name: str) -> dict[str, Any]:
    """Read a checkpoint of the run, in today's form."""
    return renewed(read_checkpoint(folder / CHECKPOINTS / name, assembly.problem.space))


def _kept(folder: Path, closed: int) -> Tensor:
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


def _check_stateless(models: Models) -> None:
    """Refuse clients that keep something between rounds, which a trajectory does not hold.

    Raises:
        ValueError: names what is kept.

    """
    problem, method = models.assembly.problem, models.assembly.method
    kept = {
        "objective=scaffold (control variates)": method.make_module(problem.net, 1).objective.messages > 0,
        "model.local (coordinates that stay with the client)": bool(problem.space.local.any()),
        "federation.buffers=local (its statistics)": models.assembly.config["federation"]["buffers"] == "local",
        "masks that change": method.changes,
    }
    held = [name for name, there in kept.items() if there]
    if held:
        raise ValueError(
            f"clients of {models.folder} cannot be trained again in round {models.round}: {', '.join(held)}; take the "
            "last round, of which the checkpoint before it is kept"
        )
