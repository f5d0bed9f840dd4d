"""Trials before the first round, of what would fail later: network and loss on a few samples, steps of every size.

Shapes: B samples, K clients of the cohort.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsparse.core.weights import check_savable
from fedsparse.federation.client.buffers import check_integers, freeze, integers
from fedsparse.job.parts import Assembly, Problem
from fedsparse.models.copies import copied
from fedsparse.models.modes import evaluating
from fedsparse.models.stacked import stacks
from fedsparse.simulation.module import ClientModule

WANTED = "losses(forward, x, y) must return (B,): one finite number for each of B samples"


def try_out(module: ClientModule, x: Tensor, y: Tensor) -> None:
    """Try the loss, and stacked training of clients, on samples (B, ...) and labels (B,).

    Raises:
        ValueError: the loss has a wrong shape, or the model cannot be stacked; one line.

    """
    if type(module).losses is not ClientModule.losses:
        check_losses(module, x, y)
    if module.cohort > 1 and (why := obstacle(module, x, y)):
        raise ValueError(f"federation.cohort above 1 cannot stack this model: {why}; set federation.cohort=1")


def check_losses(module: ClientModule, x: Tensor, y: Tensor) -> None:
    """Refuse a user's loss that is not (B,) and finite, for the network's logits and for given ones.

    Raises:
        ValueError: one line with the class.

    """
    name = type(module).__qualname__
    try:
        inspect.signature(module.losses).bind(module.net, x, y)
    except TypeError as error:
        raise ValueError(f"{name}: {WANTED} ({error})") from None
    with evaluating(module.net):
        trained = module.losses(module.net, x, y)
        logits = module.net(x).detach()
        evaluated = module.losses(lambda _: logits, x, y)  # as in an evaluation
    for losses in (trained, evaluated):
        if (wrong := _wrong(losses, len(y))) is not None:
            raise ValueError(f"{name}: {WANTED}; it returned {wrong}")
    if not trained.requires_grad:
        raise ValueError(f"{name}: {WANTED}, by forward(x); what it returned has no gradient")


def _wrong(losses: Any, samples: int) -> str | None:
    """Describe losses that are not (B,) and finite; None if they are."""
    if not isinstance(losses, Tensor):
        return type(losses).__name__
    if losses.shape != (samples,) or not losses.is_floating_point():
        return f"{losses.dtype} of shape {tuple(losses.shape)} for {samples} samples"
    return None if bool(losses.isfinite().all()) else f"{losses.tolist()} for the first {samples} samples"


def obstacle(module: ClientModule, x: Tensor, y: Tensor) -> str:
    """Describe why K clients cannot be stacked in one forward of this network and loss; empty if they can."""
    net = copied(module.net).train()
    before = _state(net)
    with torch.no_grad():
        net(x)
    changed = [name for name, value in _state(net).items() if not _same(value, before.get(name))]
    if changed:
        return f"its {changed[0]} changes in the forward, and would be one for all clients"
    cross_entropy = type(module).losses is ClientModule.losses
    if cross_entropy and stacks(net, module.space.names, x):
        return ""
    rows = {name: tensor.detach().expand(2, *tensor.shape) for name, tensor in _named(module, net).items()}

    def losses(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return module.losses(lambda z: functional_call(net, tensors, (z,)), x, y)

    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            vmap(losses, randomness="different")(rows, torch.stack([x, x]), torch.stack([y, y]))
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""


def _named(module: ClientModule, net: nn.Module) -> dict[str, Tensor]:
    """Collect the federated tensors of a copy of the network, by name."""
    return dict(zip(module.space.names, module.space.tensors(net), strict=True))


def _state(net: nn.Module) -> dict[str, Any]:
    """Collect buffers, and numbers in attributes of modules, by name."""
    values: dict[str, Any] = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for prefix, child in net.named_modules():
        values |= {f"{prefix}.{n}".lstrip("."): v for n, v in vars(child).items() if isinstance(v, int | float)}
    return values


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def check_trainable(assembly: Assembly, buffers: str) -> None:
    """Try to save the model, and a forward of two samples and of one, if some client has a step of one.

    Args:
        assembly: the parts of the run.
        buffers: treatment of float buffers (``Buffers``).

    Raises:
        ValueError: the model cannot be saved, or refuses a step; one line.

    """
    check_savable(assembly.problem.net)
    single = next(_singles(assembly), None)
    if single is None and not integers(assembly.problem.net):
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _try_steps(assembly.problem, buffers, single)


def _try_steps(problem: Problem, buffers: str, single: tuple[int, str] | None) -> None:
    """Run a copy of the network on two samples, and on one if some client has a step of one sample."""
    net = copy.deepcopy(problem.net).cpu().train()
    if buffers == "frozen":
        freeze(net)
    before = integers(net)
    try:
        net(_samples(problem, 2))
    except Exception:  # the run raises it with more context
        return
    check_integers(net, before)
    if single is not None:
        _try_one(net, _samples(problem, 1), *single)


def _try_one(net: nn.Module, x: Tensor, client: int, remedy: str) -> None:
    try:
        net(x)
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"client {client} has a step of one sample, which the model refuses: {remedy} ({said})"
        ) from error


def _samples(problem: Problem, count: int) -> Tensor:
    """Convert the first training samples to the network's inputs."""
    train = problem.dataset.train
    return problem.inputs(train.x[torch.arange(min(count, len(train.y)))])


def _singles(assembly: Assembly) -> Iterator[tuple[int, str]]:
    """Find clients with a step of one sample, each with the option to set."""
    size = assembly.problem.batch_size
    for _, plan, _ in assembly.course.phased.stages:
        for client, part in enumerate(plan.parts):
            if len(part) and plan.work.least(len(part)) == 1:
                left = f"it holds {len(part)}, so that data.batch_size={size} leaves one over; set another"
                yield client, "set data.batch_size above 1" if size == 1 else f"{left}, or federation.local_steps"
