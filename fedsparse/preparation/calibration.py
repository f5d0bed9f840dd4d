"""Calibration: measures what a mask rule needs before the first round, and chooses the masks.

It does not depend on the size of cohorts: chunks are fixed, sums are float64, clients in order.

Shapes: ``P`` coordinates of the space, ``N`` clients, ``B`` = ceil(P / 8) bytes of a bitmap.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_number
from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.core.space import Patterns, parameters_of
from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.wire.message import bitmap_size, known_size
from fedsparse.federation.reports import left_out
from fedsparse.masks import Evidence, Mask, MaskRule, Sparsity, Thinning, choose
from fedsparse.masks.bitmaps import pack
from fedsparse.masks.thinning import exchanged, ordered, shrunk, thin
from fedsparse.preparation.preparation import Preparation
from fedsparse.preparation.tasks import Observation

log = logging.getLogger("fedsparse")


@dataclass(frozen=True)
class Calibration:
    """Options of calibration (``calibration`` of ``conf/train.yaml``).

    Args:
        where: ``clients`` scores on the clients' own shards and sums; ``server`` scores on the validation split.
        batches: most batches of a client in a calibration round.
        rounds: calibration rounds, each with newly drawn clients.
        fisher: read by the mask rule; see ``masks.rules.Fisher``.
        labels: read by the mask rule.
        head_steps: federated SGD steps of the head alone, with ``head.init=probe``.
        head_lr: their learning rate.
        cache: folder of the cache (``Cache``), or None.

    Raises:
        ValueError: ``where`` is unknown, or a number out of range.

    """

    where: str = "clients"
    batches: int = 10
    rounds: int = 1
    fisher: str = "sample"
    labels: str = "data"
    head_steps: int = 20
    head_lr: float = 0.1
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("calibration.where", self.where, "clients", "server")
        for key in ("batches", "rounds"):
            check_number(f"calibration.{key}", getattr(self, key), whole=True, least=1)
        check_number("calibration.head_steps", self.head_steps, whole=True, least=0)
        check_number("calibration.head_lr", self.head_lr, above=0)
        if not isinstance(self.cache, str | None):
            raise ValueError(f"calibration.cache is {self.cache!r}; it must be a folder, or null")


@dataclass(frozen=True)
class Calibrated:
    """Result of a calibration.

    Attributes:
        mask: the coordinates that train; with ``mask.owner=client`` those that some client trains.
        bitmaps: uint8 (N, B), each client's own mask; empty with ``mask.owner=global``.
        overlap: Jaccard index of the final mask with the one after each earlier calibration round.
        observed: (P,), of all rounds, for masks that are chosen later (``Evidence``); None without calibration.

    """

    mask: Mask
    bitmaps: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))
    overlap: tuple[float, ...] = ()
    observed: Tensor | None = None


@dataclass(frozen=True)
class CalibrationJob:
    """A calibration to execute.

    Attributes:
        rule: scores the coordinates.
        sparsity: how many coordinates train.
        calibration: options of the measurement.
        head: names of the head's parameters.

    Raises:
        ValueError: the mask would change later, which the rule does not support.

    """

    rule: MaskRule
    sparsity: Sparsity
    calibration: Calibration
    head: Patterns

    def __post_init__(self) -> None:
        """Check that rule and sparsity are compatible."""
        kind = self.rule.calibration
        if not self.sparsity.constant and isinstance(kind, Thinning) and not kind.order:
            raise ValueError(
                f"the mask rule {type(self.rule).__name__} chooses once, in its own rounds; with it "
                "sparsity.schedule and sparsity.renew_every must be null"
            )


def calibrate(preparation: Preparation, job: CalibrationJob) -> Calibrated:
    """Choose one mask for all clients."""
    masks, observed = [], None
    for observed in _rounds(preparation, job):
        masks.append(_mask(preparation, job, observed, ()))
    overlap = tuple(mask.overlap(masks[-1]) for mask in masks[:-1])
    return Calibrated(masks[-1], overlap=overlap, observed=None if observed is None else observed.cpu())


def calibrate_clients(preparation: Preparation, job: CalibrationJob) -> Calibrated:
    """Choose a mask for every client with data, on its own shard; each client sends its bitmap once.

    The server returns the bitmap of the union of masks: the coordinates that it will send.

    Raises:
        ValueError: ``calibration.where=server``: the server has no client's data.

    """
    if job.calibration.where == "server":
        raise ValueError("mask.owner=client scores on each client's own data; set calibration.where=clients")
    space, clients = preparation.space, preparation.eligible
    bitmaps = torch.zeros(len(preparation.parts), -(-space.size // 8), dtype=torch.uint8)
    union = torch.zeros(space.size, dtype=torch.bool)
    lost = {}
    for client in clients:
        try:
            observed = observe(preparation, job, client)
        except Diverged as error:  # this client trains nothing
            lost[client] = error
            continue
        row = _mask(preparation, job, observed, (client,)).row(space)
        bitmaps[client], union = pack(row), union | row
    if len(lost) == len(clients):
        raise lost[clients[0]]
    if lost:
        log.warning("calibration: %s", left_out(lost, "NaN or infinity in what is observed"))
    length = bitmap_size(space.size).total
    preparation.ledger.first_model(clients, preparation.model_length)
    preparation.ledger.setup(len(clients), up=length, down=length)
    preparation.ledger.has_mask |= set(clients)
    name = {"rule": type(job.rule).__name__, "owner": "client", **job.sparsity.at(0).metadata}
    return Calibrated(Mask.of(space, union, **name), bitmaps)


def observe(preparation: Preparation, job: CalibrationJob, client: int | None = None) -> Tensor | None:
    """Measure ``Evidence.observed`` in all calibration rounds; None if the rule needs no calibration."""
    *_, observed = _rounds(preparation, job, client)
    return observed


def _rounds(preparation: Preparation, job: CalibrationJob, client: int | None = None) -> Iterator[Tensor | None]:
    """Iterate over the observed values after each calibration round, on one client's data or on the round's clients."""
    kind = job.rule.calibration
    if kind is None:
        yield None
    elif isinstance(kind, Thinning):
        yield from _thinned(preparation, job, kind, client)
    else:
        yield from _summed(preparation, job, client)


def _summed(preparation: Preparation, job: CalibrationJob, client: int | None) -> Iterator[Tensor]:
    """Sum over batches, clients and rounds: float64 (P,), the same sum after each round."""
    total = _zeros(preparation)
    for round in range(job.calibration.rounds):
        _observe(preparation, job, _observation(job, round), client, total)
        yield total


def _thinned(preparation: Preparation, job: CalibrationJob, thinning: Thinning, client: int | None) -> Iterator[Tensor]:
    """Score the remaining coordinates each round, drop the worst: yields bool (P,), or the order (P,) of dropping."""
    net, space, left = preparation.net, preparation.space, None
    row, rounds = space.read(net), thinning.rounds or job.calibration.rounds
    order = _zeros(preparation) if thinning.order and job.sparsity.schedule is not None else None
    for round in range(rounds):
        scores = _zeros(preparation)
        space.write(net, shrunk(row, left, thinning.shrink))
        try:
            if thinning.clients:
                _observe(preparation, job, _observation(job, round, left, thinning.shrink), client, scores)
            else:
                _observe_alone(preparation, job, scores)
        finally:  # also after a client that is left out, since the next one uses this network
            space.write(net, row)
        power = (round + 1) / rounds
        kept = thin(scores, left, space, job.sparsity, largest=job.rule.largest, power=power)
        order = None if order is None else ordered(order, left, kept, scores, round)
        left = kept
        if thinning.clients or round == rounds - 1:
            yield left if order is None else order


def _zeros(preparation: Preparation) -> Tensor:
    """Build a sum of zeros, float64 (P,), on the network's device."""
    device = preparation.space.tensors(preparation.net)[0].device
    return torch.zeros(preparation.space.size, dtype=torch.float64, device=device)


def _observe_alone(preparation: Preparation, job: CalibrationJob, total: Tensor) -> None:
    """Add the rule's observation of the network without data; the validation split only gives the shape of an input."""
    x, y = preparation.take(preparation.dataset.val, np.arange(1))
    job.rule.observe(
        preparation.net,
        preparation.space,
        torch.zeros_like(x),
        torch.zeros_like(y),
        loss=preparation.losses,
        into=total,
    )


def _observation(job: CalibrationJob, round: int, left: Tensor | None = None, shrink: float = 1.0) -> Observation:
    """Build the task of a calibration round."""
    return Observation(job.rule, job.head, round, job.calibration.batches, left, shrink)


def _observe(
    preparation: Preparation, job: CalibrationJob, task: Observation, client: int | None, total: Tensor
) -> None:
    """Add observations to ``total``, float64 (P,): of one client, of the validation split, or of the round's clients.

    What is not finite is left out. Messages and steps of the round's clients are counted in the ledger.

    Raises:
        Diverged: nothing is finite.

    """
    lost, sources = set[int](), 0
    for source, scores in _scores(preparation, job, task, client):
        sources += 1
        if scores is not None and bool(scores.isfinite().all()):
            total.add_(scores)
        else:
            lost.add(source)
    if len(lost) == sources:
        raise Diverged(
            "calibration: what is observed is NaN or infinite everywhere, so the run stops; try a smaller "
            "calibration.head_lr, and look at the data's range"
        )
    if lost:
        log.warning("calibration: %s", left_out(lost, "NaN or infinity in what is observed"))


def _scores(
    preparation: Preparation, job: CalibrationJob, task: Observation, client: int | None
) -> Iterator[tuple[int, Tensor | None]]:
    """Iterate over the scores (P,) of a round: of clients as they send them; None of one that did not answer."""
    if client is not None:  # it chooses its own mask, and sends no scores
        yield client, task.of(preparation, preparation.dataset.train, preparation.parts[client], client)
    elif job.calibration.where == "server":
        val = preparation.dataset.val
        yield 0, task.of(preparation, val, np.arange(len(val.y)), 0)
    else:
        clients = preparation.sample(task.round, Purpose.CALIBRATION)
        _count(preparation, job, task, clients)
        answers = preparation.gather(preparation, task, clients)
        for source, answer in zip(clients, answers, strict=True):
            yield source, None if answer is None else answer[0]


def _count(preparation: Preparation, job: CalibrationJob, task: Observation, clients: Sequence[int]) -> None:
    """Count the messages and steps of a round's clients in the ledger."""
    scores, bitmap = exchanged(preparation.space.size, task.left)
    head = sum(parameter.numel() for parameter in parameters_of(preparation.net, job.head))
    preparation.ledger.first_model(clients, preparation.model_length)
    preparation.ledger.client_steps += sum(_batches(preparation, job, client) for client in clients)
    dtype = preparation.space.tensors(preparation.net)[0].dtype
    up, down = known_size(scores, 0, task.dtype(preparation)).total, known_size(head, 0, dtype).total
    marks = bitmap_size(preparation.space.size).total if bitmap else 0
    preparation.ledger.setup(len(clients), up=up, down=down + marks)


def _batches(preparation: Preparation, job: CalibrationJob, client: int) -> int:
    """Count a client's batches in a calibration round."""
    return min(job.calibration.batches, -(-len(preparation.parts[client]) // preparation.batch_size))


def _mask(preparation: Preparation, job: CalibrationJob, observed: Tensor | None, owner: tuple[int, ...]) -> Mask:
    """Choose one mask; random rules draw from a stream keyed by its owner."""
    row = preparation.space.read(preparation.net).cpu()
    stream = torch_generator(preparation.seed, Purpose.MASK, *owner)
    observed = None if observed is None else observed.cpu()
    return choose(job.rule, Evidence(preparation.space, row, job.sparsity.at(0), stream, observed))
