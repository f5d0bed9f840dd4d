"""What a landscape is drawn of: a run's models by name, its data, and the plane and lines through them.

Shapes: P coordinates, M models, R rounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.core.folder import TRAJECTORY
from fedsparse.core.seeding import Purpose, generator, torch_generator
from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Split
from fedsparse.federation.trajectory import read_rounds, read_row
from fedsparse.job.parts import Problem
from fedsparse.job.summary import sha256
from fedsparse.landscape.directions import Plane
from fedsparse.landscape.options import GLOBAL, REFERENCE, Options, client_of, title
from fedsparse.landscape.replay import Models, check_client, check_frozen, load, local_row
from fedsparse.landscape.task import Task
from fedsparse.preparation.cache import code_version
from fedsparse.simulation.devices import device_of

PLANE, SAMPLES, CURVATURE, SHARPNESS, SIGMA, HELD_OUT = range(6)  # streams of random numbers
MARGIN = 0.3  # around models, as a part of their extent
HASHED = 4096  # samples that are read at once


@dataclass(frozen=True)
class Scene:
    """Models, data and losses of a run.

    Attributes:
        options: what is asked for.
        models: of the run.
        task: the network and its losses.
        known: rows (P,) by name; a client is trained again when its row is first needed.
        identity: hashes of what every figure depends on.

    """

    options: Options
    models: Models
    task: Task
    known: dict[str | int, Tensor] = field(repr=False)
    identity: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, folder: Path, options: Options, trusted: Sequence[str] = ()) -> Scene:
        """Load a run, and its reference.

        Raises:
            ValueError: the run is not finished, a row was not kept, frozen weights change, a client is unknown or
                holds no data, or the reference is of another model.

        """
        if options.plane == "pca" and not (folder / TRAJECTORY).is_file():
            raise ValueError(f"plane=pca needs the {TRAJECTORY} that trajectory=global writes; {folder} has none")
        models = load(folder, options.round, trusted)
        check_frozen(models.assembly, folder)
        problem = models.assembly.problem
        asked = [model for model in options.models if isinstance(model, int)]
        for client in [*asked, *(c for c in map(client_of, options.data) if c is not None)]:
            check_client(problem, client)
        known: dict[str | int, Tensor] = {GLOBAL: models.global_row}
        if options.reference is not None:
            other = load(Path(options.reference), None, trusted)
            _check_reference(options.reference, problem, other.assembly.problem)
            known[REFERENCE] = other.global_row
        module = models.assembly.module().to(device_of(models.assembly.session.accelerator))
        clients = module.form()
        task = Task.of(clients, problem.dealt)
        clients.release()
        identity = {
            "global": sha256(models.global_row),
            "rest": _rest(task.net, problem.space),
            "mask": sha256(models.mask),
        }
        run = {"start": sha256(models.start), "round": models.round, "code": code_version()}
        return cls(options, models, task, known, identity | run)

    def row(self, model: str | int) -> Tensor:
        """Read a model (P,)."""
        if model not in self.known:
            self.known[model] = local_row(self.models, int(model))
        return self.known[model]

    def split(self, data: str, samples: int | None) -> Split:
        """Gather the samples of a split, at most so many, drawn by the seed."""
        problem, client = self.models.assembly.problem, client_of(data)
        if client is not None:
            index = torch.from_numpy(np.asarray(problem.parts[client], dtype=np.int64))
            whole = Split(problem.dataset.train.x[index], problem.dataset.train.y[index])
        else:
            whole = problem.dealt if data == "train" else problem.dataset.common_test
        if samples is None or samples >= len(whole.y):
            return whole
        drawn = torch.randperm(len(whole.y), generator=self.generator(SAMPLES))[:samples].sort().values
        return Split(whole.x[drawn], whole.y[drawn])

    def generator(self, stream: int) -> torch.Generator:
        """Build a generator of the seed."""
        return torch_generator(self.options.seed, Purpose.LANDSCAPE, stream)

    def numpy_generator(self, stream: int) -> np.random.Generator:
        """Build NumPy's generator of the seed."""
        return generator(self.options.seed, Purpose.LANDSCAPE, stream)

    def at(self, round: int) -> Scene:
        """Take the models of another round; the reference stays.

        Raises:
            ValueError: its row was not kept.

        """
        models = self.models.at(round)
        known: dict[str | int, Tensor] = {GLOBAL: models.global_row}
        known |= {name: row for name, row in self.known.items() if name == REFERENCE}
        identity = self.identity | {"global": sha256(models.global_row), "round": round}
        return replace(self, models=models, known=known, identity=identity)

    @property
    def mask(self) -> Tensor | None:
        """Coordinates that move, bool (P,); None: all."""
        if self.options.mask == "all":
            return None
        return self.models.mask if self.options.mask == "inside" else ~self.models.mask

    def key(self, split: Split, *words: Any) -> str:
        """Hash all that figures on a split depend on."""
        text = json.dumps([self.identity, data_hash(split), *words], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def named(self, models: Sequence[str | int]) -> list[Any]:
        """List models for a key; a reference by its hash, since another run may have the folder's name."""
        return [sha256(self.row(model)) if model == REFERENCE else model for model in models]

    def rounds(self) -> list[int]:
        """Rounds of the trajectory up to the one that is drawn."""
        kept = read_rounds(self.models.folder / TRAJECTORY)
        return [closed for closed in kept if closed <= self.models.round]

    def marked(self) -> dict[str, Tensor]:
        """Models that are marked in the plane, by their titles: those asked for, or those of the trajectory."""
        if self.options.plane == "pca":
            path = self.models.folder / TRAJECTORY
            return {f"round {closed}": read_row(path, closed).to(self.task.like.dtype) for closed in self.rounds()}
        return {title(model): self.row(model) for model in self.options.models}

    def plane(self) -> Plane:
        """Lay the plane.

        Raises:
            ValueError: models or directions span none.

        """
        options, space = self.options, self.task.space
        if options.plane == "random":
            return Plane.random(self.row(options.models[0]), space, self.generator(PLANE), self.mask)
        if options.plane == "models":
            return Plane.through(torch.stack([self.row(model) for model in options.models[:3]]), self.mask)
        rows = torch.stack(list(self.marked().values()))
        return Plane.pca(rows if self.mask is None else torch.where(self.mask, rows, rows[-1]))

    def axes(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Lay out the axes, float64 (A,), (B,), around models at coordinates (M, 2)."""
        if self.options.range is not None:
            low, high = self.options.range
            ends = [(low, high)] * 2
        elif self.options.plane == "random":
            ends = [(-1.0, 1.0)] * 2
        else:
            first, last = coordinates.min(0).values, coordinates.max(0).values
            margin = MARGIN * float((last - first).max())
            ends = list(zip((first - margin).tolist(), (last + margin).tolist(), strict=True))
        a, b = (torch.linspace(low, high, self.options.grid, dtype=torch.float64) for low, high in ends)
        return a, b


def data_hash(split: Split) -> str:
    """Hash the samples and labels of a split."""
    found = hashlib.sha256()
    for index in torch.arange(len(split.y)).split(HASHED):
        for part in (split.x[index], split.y[index]):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _rest(net: nn.Module, space: ParamSpace) -> str:
    """Hash what of a network is no coordinate: frozen parameters, and buffers."""
    rest = {name: value for name, value in net.state_dict().items() if name not in space.names}
    text = json.dumps({name: sha256(value.reshape(-1)) for name, value in rest.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_reference(folder: str, own: Problem, other: Problem) -> None:
    """Refuse a reference with other coordinates, or with other frozen parameters.

    Raises:
        ValueError: one line.

    """
    frozen = [dict(problem.net.named_parameters()) for problem in (own, other)]
    rest = [{n: p for n, p in named.items() if n not in own.space.names} for named in frozen]
    same = own.space == other.space and rest[0].keys() == rest[1].keys()
    if not same or not all(torch.equal(p.cpu(), rest[1][n].cpu()) for n, p in rest[0].items()):
        raise ValueError(f"reference={folder} is a run of another model; no line joins the two")
