"""Reads the models of a run from its folder: of its end, with sample inputs, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsparse.core.checks import check_choice
from fedsparse.core.folder import BEST, CHECKPOINTS, CONFIG, LAST, PREVIOUS, SUMMARY, WEIGHTS
from fedsparse.core.weights import load_weights
from fedsparse.job.assemble import assemble_problem
from fedsparse.job.config import register_resolvers
from fedsparse.job.resume import read_job
from fedsparse.models.lora import merged
from fedsparse.simulation.checkpoint import read_checkpoint, renewed
from fedsparse.simulation.origin import Origin, model_of

SAVED = {"last": LAST, "best": BEST, "previous": PREVIOUS}  # checkpoints of a run folder
SAMPLES = 8  # random inputs, and as many of the test split


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        folder: the run folder.
        net: its model, in evaluation mode.
        arguments: of the model's builder.
        real: the model's inputs of the first test samples, (SAMPLES, ...).
        unit: ``sparsity.unit``.

    """

    folder: Path
    net: nn.Module
    arguments: dict[str, Any]
    real: Tensor
    unit: str


def check_finished(folder: Path) -> None:
    """Refuse a folder without a finished run.

    Raises:
        ValueError: one line that says how to finish it.

    """
    if not all((folder / name).is_file() for name in (SUMMARY, WEIGHTS, CONFIG)):
        raise ValueError(f"{folder} holds no finished run; python -m fedsparse.train resume={folder} finishes one")


def read_run(folder: Path, trusted: Sequence[str] = ()) -> Finished:
    """Read a finished run and build its model, low-rank adapters merged.

    Args:
        folder: the run folder.
        trusted: packages whose code the configuration may name.

    Raises:
        ValueError: there is no such folder, the run is not finished, or its files are damaged.

    """
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}; run= takes the folder that a run printed")
    check_finished(folder)
    cfg = read_job(folder, trusted=trusted).cfg
    _without_weights(cfg.model)
    problem = assemble_problem(cfg)
    try:
        problem.net.load_state_dict(load_weights(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or of another model ({type(error).__name__})") from error
    split = problem.dataset.test
    real = problem.inputs(split.x[torch.arange(min(SAMPLES, len(split.y)))])
    net, arguments = problem.net, problem.arguments
    if problem.adapters:  # a program that loads the model needs no PEFT
        net, arguments = merged(net), arguments["net"]
    return Finished(folder, net.eval(), arguments, real, str(cfg.sparsity.unit))


def saved_weights(folder: Path, checkpoint: str = "last", trusted: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read the model of a checkpoint whole: what it holds, and what stays as the model's builder makes it.

    Args:
        folder: the run folder, of a run that is finished or not.
        checkpoint: ``last``, ``best`` by validation, or ``previous``, the last but one.
        trusted: packages whose code the configuration may name.

    Returns:
        The network's state by its names, on the CPU; with several global models that of the first group.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the builder makes other weights than the run began
            with.

    """
    check_choice("checkpoint", checkpoint, *SAVED)
    path = folder / CHECKPOINTS / SAVED[checkpoint]
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CHECKPOINTS}/{SAVED[checkpoint]}; give a run folder that has one")
    register_resolvers()  # for a program of one's own: the commands have done it
    problem = assemble_problem(read_job(folder, trusted=trusted).cfg)
    return model_of(Origin.of(problem.net, problem.space), renewed(read_checkpoint(path, problem.space)))


def inputs(run: Finished, seed: int) -> Tensor:
    """Draw random inputs (standard normal; tokens shuffled) and append the real ones: (2 SAMPLES, ...)."""
    generator = torch.Generator().manual_seed(seed)
    if run.real.is_floating_point():
        random = torch.randn(run.real.shape, generator=generator)
    else:
        random = run.real[:, torch.randperm(run.real.shape[1], generator=generator)]
    return torch.cat([random, run.real])


def _without_weights(model: DictConfig) -> None:
    """Unset the builder's pre-trained weights, which the file replaces; BERT's checkpoint stays: it sets the size."""
    for key, value in {"pretrained": False, **({} if "tokenizer" in model else {"checkpoint": None})}.items():
        if key in model:
            model[key] = value
