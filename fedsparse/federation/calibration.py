"""What happens before the first round: the head's first steps, and the scores that a mask rule asks for.

Does not depend on the cohort size: fixed chunks, sums in float64, clients in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.data.datasets import Dataset, Split
from fedsparse.federation.ledger import Ledger
from fedsparse.federation.wire import HEADER
from fedsparse.keys import Purpose, generator, torch_generator
from fedsparse.masks import Mask, MaskRule, Sparsity
from fedsparse.space import ParamSpace, Patterns, matches

Losses = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
Sample = Callable[[int, Purpose], Sequence[int]]


@dataclass(frozen=True)
class Calibration:
    """How head and mask are prepared (``conf/calibration``).

    Args:
        where: ``clients`` scores on the clients' own shards and sums; ``server`` scores on the validation split.
        batches: at most so many batches per client and calibration round.
        rounds: calibration rounds, each with freshly sampled clients.
        fisher: read by the mask rule; see ``masks.rules.Fisher``.
        labels: read by the mask rule.
        head_steps: federated SGD steps of the head alone.
        head_lr: their learning rate.

    Raises:
        ValueError: an unknown place, or negative head steps.

    """

    where: str = "clients"
    batches: int = 10
    rounds: int = 1
    fisher: str = "sample"
    labels: str = "data"
    head_steps: int = 20
    head_lr: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.where not in ("clients", "server"):
            raise ValueError(f"calibration.where is {self.where!r}; it must be clients or server")
        if isinstance(self.head_steps, bool) or not isinstance(self.head_steps, int) or self.head_steps < 0:
            raise ValueError(f"calibration.head_steps is {self.head_steps!r}; it must be a whole number of 0 or more")


@dataclass(frozen=True)
class Setting:
    """What calibration works on.

    Attributes:
        net: the network; its head moves, the rest stays.
        space: its federated tensors.
        dataset: the splits.
        parts: sample indices of every client.
        sample: which clients take part, by round and purpose.
        losses: per-sample losses of a batch (``ClientModule.losses``).
        batch_size: samples of a batch.
        seed: the run's seed.
        ledger: counts bytes.
        model_length: bytes of the first model.

    """

    net: nn.Module
    space: ParamSpace
    dataset: Dataset
    parts: Sequence[np.ndarray]
    sample: Sample
    losses: Losses
    batch_size: int
    seed: int
    ledger: Ledger
    model_length: int


def warm_head(setting: Setting, head: Patterns, steps: int, lr: float) -> None:
    """Take federated SGD steps of the head alone: each client sends the gradient of one batch, the server averages.

    All runs start from the same head so, whatever their mask rule; and a head of zeros, or a random one, would make the
    Fisher information of the backbone vanish, or mislead it.
    """
    parameters = [p for name, p in setting.net.named_parameters() if matches(name, head)]
    length = HEADER.size + sum(p.nbytes for p in parameters)
    setting.net.eval()
    for step in range(steps):
        clients = setting.sample(step, Purpose.HEAD)
        mean = _mean_gradient(setting, parameters, step, clients)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, mean, strict=True):
                parameter.sub_((lr * gradient).to(parameter.dtype))
        setting.ledger.first_model(clients, setting.model_length)
        setting.ledger.setup(len(clients), up=length, down=length)
    setting.net.train()


def _mean_gradient(setting: Setting, parameters: list[nn.Parameter], step: int, clients: Sequence[int]) -> list[Tensor]:
    """Mean gradient of the head over one batch of each client, weighted by samples held, in float64."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for client in clients:
        part = setting.parts[client]
        batch = generator(setting.seed, Purpose.HEAD, step, client).permutation(part)[: setting.batch_size]
        x, y = _take(setting.dataset.train, batch)
        gradients = torch.autograd.grad(setting.losses(setting.net, x, y).mean(), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient, alpha=len(part))
    held = sum(len(setting.parts[client]) for client in clients)
    return [total / held for total in sums]


def observe(setting: Setting, rule: MaskRule, calibration: Calibration, head: Patterns) -> Tensor | None:
    """Sum what a rule observes on calibration batches: float64 (P,), or None if it needs no data."""
    if not rule.needs_data:
        return None
    total = torch.zeros(setting.space.size, dtype=torch.float64)
    for source in _sources(setting, calibration, head):
        for x, y in source.batches:
            loss = setting.losses
            total += rule.observe(setting.net, setting.space, x, y, loss=loss, generator=source.generator).cpu()
    return total


@dataclass(frozen=True)
class _Source:
    """Batches of one client or of the server, and the generator for labels sampled from the model."""

    batches: Iterator[tuple[Tensor, Tensor]]
    generator: torch.Generator


def _sources(setting: Setting, calibration: Calibration, head: Patterns) -> Iterator[_Source]:
    """The server's validation split, or each sampled client's shard in each calibration round."""
    if calibration.where == "server":
        everything = np.arange(len(setting.dataset.val.y))
        for round in range(calibration.rounds):
            yield _source(setting, setting.dataset.val, everything, calibration.batches, round, 0)
        return
    up = HEADER.size + 4 * setting.space.size
    down = HEADER.size + 4 * int(setting.space.where(head).sum())
    for round in range(calibration.rounds):
        clients = setting.sample(round, Purpose.CALIBRATION)
        setting.ledger.first_model(clients, setting.model_length)
        setting.ledger.setup(len(clients), up=up, down=down)
        for client in clients:
            part = setting.parts[client]
            yield _source(setting, setting.dataset.train, part, calibration.batches, round, client)


def _source(setting: Setting, split: Split, part: np.ndarray, batches: int, round: int, owner: int) -> _Source:
    order = generator(setting.seed, Purpose.CALIBRATION, round, owner).permutation(part)
    starts = range(0, min(len(order), batches * setting.batch_size), setting.batch_size)
    dealt = (_take(split, order[start : start + setting.batch_size]) for start in starts)
    return _Source(dealt, torch_generator(setting.seed, Purpose.CALIBRATION, round, owner))


def _take(split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Gather samples by index."""
    index = torch.from_numpy(np.asarray(indices)).to(split.x.device)
    return split.x[index], split.y[index]


def prepare_mask(
    setting: Setting, rule: MaskRule, sparsity: Sparsity, calibration: Calibration, head: Patterns
) -> Mask:
    """Warm the head, let the rule observe, and choose the coordinates that train."""
    warm_head(setting, head, calibration.head_steps, calibration.head_lr)
    observed = observe(setting, rule, calibration, head)
    row = setting.space.read(setting.net).cpu()
    return rule.mask(
        setting.space, row, sparsity, observed=observed, generator=torch_generator(setting.seed, Purpose.MASK)
    )
