"""What would stop a run after it has trained for a while, tried before its first round."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from fedsparse.core.weights import check_savable
from fedsparse.federation.client.buffers import check_integers, freeze, integers
from fedsparse.job.assemble import Parts


def check_trainable(cfg: DictConfig, federation: Parts) -> None:
    """Try whether the model can be saved, and take a step of every size that a client will take.

    Raises:
        ValueError: one line that names what cannot be done.

    """
    check_savable(federation.net)
    single = next(_singles(cfg, federation), None)
    if single is None and not integers(federation.net):
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _try_steps(cfg, federation, single)


def _try_steps(cfg: DictConfig, federation: Parts, single: tuple[int, str] | None) -> None:
    """Let a copy of the network see two samples, and one alone if some step holds no more."""
    net = copy.deepcopy(federation.net).cpu().train()
    if cfg.federation.buffers == "frozen":
        freeze(net)
    before = integers(net)
    try:
        net(_samples(federation, 2))
    except Exception:  # the run says it, with all that it knows
        return
    check_integers(net, before)
    if single is not None:
        _try_one(net, _samples(federation, 1), *single)


def _try_one(net: nn.Module, x: Tensor, client: int, remedy: str) -> None:
    try:
        net(x)
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"client {client} has a step of one sample, which the model refuses: {remedy} ({said})"
        ) from error


def _samples(federation: Parts, count: int) -> Tensor:
    """Take the first samples as the network takes them."""
    return federation.inputs(federation.dataset.train.x[torch.arange(min(count, len(federation.dataset.train.y)))])


def _singles(cfg: DictConfig, federation: Parts) -> Iterator[tuple[int, str]]:
    """Find clients that would take a step on one sample, and what would mend that."""
    size = cfg.data.batch_size
    for _, plan, _ in federation.phased.stages:
        for client, part in enumerate(plan.parts):
            if len(part) and plan.work.least(len(part)) == 1:
                left = f"it holds {len(part)}, so that data.batch_size={size} leaves one over; set another"
                yield client, "set data.batch_size above 1" if size == 1 else f"{left}, or federation.local_steps"
