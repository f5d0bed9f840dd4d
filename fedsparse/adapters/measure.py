"""Figures of adapters on test parts: accuracy and loss of every model on the data of every department and client.

Shapes: N samples of the test split, M models, D parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.adapters.kept import Kept, Model, Moment
from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.simulation.devices import device_of
from fedsparse.simulation.evaluation import weighted_mean
from fedsparse.simulation.trainer import as_trained

COMMON = "test"  # the test split, without clients' own samples


@dataclass(frozen=True)
class Outcome:
    """What a model does with each sample of the test split.

    Attributes:
        correct: bool (N,); of a sequence whether all its targets are.
        losses: float64 (N,).
        weights: float64 (N,), of the samples in a mean of the losses.

    """

    correct: Tensor
    losses: Tensor
    weights: Tensor

    def on(self, part: np.ndarray) -> dict[str, float]:
        """Average over some samples, by index."""
        index = torch.as_tensor(part, dtype=torch.int64)
        return {
            "accuracy": float(self.correct[index].double().mean()),
            "loss": weighted_mean(self.losses[index].unsqueeze(1), self.weights[index]),
            "samples": len(index),
        }


@torch.no_grad()
def outcome(kept: Kept, moment: Moment, model: Model) -> Outcome:
    """Evaluate a model on the whole test split, as the run was evaluated."""
    assembly, problem = kept.assembly, kept.assembly.problem
    device, module, test = device_of(assembly.session.accelerator), assembly.module(), problem.dataset.test
    found = list[tuple[Tensor, Tensor, Tensor]]()
    with made_in(dtype_of(problem.precision)), as_trained(assembly.session):
        net = kept.load(moment, model).to(device)
        for batch in torch.arange(len(test.y)).split(assembly.datamodule().eval_batch_size):
            x, y = test.x[batch].to(device), test.y[batch].to(device)
            scores = module.scores(net(problem.inputs(x)), x, y)
            correct, losses = scores["correct"].cpu(), scores["losses"].double().cpu()
            found.append((correct, losses, scores.get("weights", torch.ones_like(losses)).double().cpu()))
        net.cpu()
    return Outcome(*(torch.cat(numbers) for numbers in zip(*found, strict=True)))


def parts(kept: Kept) -> dict[str, np.ndarray]:
    """List the test parts by name, as indices of the test split: common, of departments, of clients; none is empty.

    A department's are the samples of its clients, one by one: a sample that two clients hold counts twice.
    """
    problem = kept.assembly.problem
    found = {COMMON: np.arange(len(problem.dataset.test.y) - problem.dataset.own)}
    for department in kept.departments if len(kept.departments) > 1 else ():
        found[department] = part_of(kept, kept.members(department))
    found |= {client_part(client): np.asarray(part) for client, part in enumerate(problem.tests)}
    return {name: part for name, part in found.items() if len(part)}


def client_part(client: int) -> str:
    """Name the test part of a client."""
    return f"client_{client}"


def _clients_of(kept: Kept, model: Model) -> list[int]:
    """List the clients whose model it is."""
    return kept.members(model.department) if model.client is None else [model.client]


def part_of(kept: Kept, clients: Sequence[int]) -> np.ndarray:
    """Join the test parts of clients: indices of the test split."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(kept.assembly.problem.tests[client] for client in clients)])


def matrix(kept: Kept, moment: Moment, models: Sequence[Model]) -> dict[str, Any]:
    """Evaluate M models on D parts.

    Returns:
        ``round``, ``models`` (M names), ``own`` (M lists of the parts of a model's own clients), ``parts`` (D names),
        ``samples`` (D,), ``accuracy`` and ``loss`` (M x D lists).

    """
    columns = parts(kept)
    rows = [[found.on(part) for part in columns.values()] for found in (outcome(kept, moment, m) for m in models)]
    cells: Mapping[str, Any] = {key: [[cell[key] for cell in row] for row in rows] for key in ("accuracy", "loss")}
    return {
        "round": moment.round,
        "models": [model.name for model in models],
        "own": [[name for name in map(client_part, _clients_of(kept, model)) if name in columns] for model in models],
        "parts": list(columns),
        "samples": [len(part) for part in columns.values()],
        **cells,
    }
