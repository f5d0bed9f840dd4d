"""Calibration: what a mask rule observes before the first round, and the masks that are chosen by it.

Does not depend on the cohort size: fixed chunks, sums in float64, clients in their order.

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
from fedsparse.core.seeding import Purpose, generator, torch_generator
from fedsparse.core.space import Patterns
from fedsparse.data.datasets import Split
from fedsparse.federation.exchange.wire.message import bitmap_size, known_size
from fedsparse.federation.reports import Diverged, left_out
from fedsparse.masks import Evidence, Mask, MaskRule, Sparsity, Thinning, choose
from fedsparse.masks.bitmaps import pack
from fedsparse.masks.thinning import exchanged, ordered, shrunk, thin
from fedsparse.preparation.preparation import Preparation

log = logging.getLogger("fedsparse")


@dataclass(frozen=True)
class Calibration:
    """How scores are measured (``calibration`` of ``conf/train.yaml``).

    Args:
        where: ``clients`` scores on the clients' own shards and sums; ``server`` scores on the validation split.
        batches: at most so many batches per client and calibration round.
        rounds: calibration rounds, each with freshly sampled clients.
        fisher: read by the mask rule; see ``masks.rules.Fisher``.
        labels: read by the mask rule.
        head_steps: federated SGD steps of the head alone, with ``head.init=probe``.
        head_lr: their learning rate.
        cache: folder where calibrated masks are kept and found again, or None.

    Raises:
        ValueError: an unknown place, or a number out of range.

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
        """Refuse what cannot be meant."""
        check_choice("calibration.where", self.where, "clients", "server")
        for key in ("batches", "rounds"):
            check_number(f"calibration.{key}", getattr(self, key), whole=True, least=1)
        check_number("calibration.head_steps", self.head_steps, whole=True, least=0)
        check_number("calibration.head_lr", self.head_lr, above=0)
        if not isinstance(self.cache, str | None):
            raise ValueError(f"calibration.cache is {self.cache!r}; it must be a folder, or null")


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        mask: the coordinates that train; with ``mask.owner=client`` those that some client trains.
        bitmaps: uint8 (N, B), each client's own mask; empty with ``mask.owner=global``.
        overlap: Jaccard index with the final mask of what the rule would have given after each earlier round.
        observed: after the last round, (P,), for masks that are chosen later (``Evidence``); None without calibration.

    """

    mask: Mask
    bitmaps: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))
    overlap: tuple[float, ...] = ()
    observed: Tensor | None = None


@dataclass(frozen=True)
class CalibrationJob:
    """A calibration: of which rule, to which sparsity, how.

    Attributes:
        rule: scores the coordinates.
        sparsity: how many train.
        calibration: how scores are measured.
        head: names of the head's parameters.

    Raises:
        ValueError: the mask is to be chosen anew later, which the rule cannot.

    """

    rule: MaskRule
    sparsity: Sparsity
    calibration: Calibration
    head: Patterns

    def __post_init__(self) -> None:
        """Refuse what the rule cannot do."""
        kind = self.rule.calibration
        if not self.sparsity.constant and isinstance(kind, Thinning) and not kind.order:
            raise ValueError(
                f"the mask rule {type(self.rule).__name__} chooses once, in its own rounds; with it "
                "sparsity.schedule and sparsity.renew_every must be null"
            )


@dataclass(frozen=True)
class Source:
    """Samples of one client or of the server, and who it is for the random streams."""

    split: Split
    part: np.ndarray
    owner: int


def calibrate(preparation: Preparation, job: CalibrationJob) -> Calibrated:
    """Choose one mask for all clients."""
    masks, observed = [], None
    for observed in _rounds(preparation, job):
        masks.append(_mask(preparation, job, observed, ()))
    overlap = tuple(mask.overlap(masks[-1]) for mask in masks[:-1])
    return Calibrated(masks[-1], overlap=overlap, observed=None if observed is None else observed.cpu())


def calibrate_clients(preparation: Preparation, job: CalibrationJob) -> Calibrated:
    """Let every client that holds data choose its own mask on its own shard; each bitmap is sent up once.

    The server answers with the bitmap of what anybody trains: those coordinates it will send down.

    Raises:
        ValueError: ``calibration.where=server``, which has no client's data.

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
        except Diverged as error:  # it trains nothing
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
    """Measure what the rule needs in all calibration rounds (``Evidence.observed``); None if it needs nothing."""
    *_, observed = _rounds(preparation, job, client)
    return observed


def _rounds(preparation: Preparation, job: CalibrationJob, client: int | None = None) -> Iterator[Tensor | None]:
    """What is observed after each calibration round, on one client's data or on those sampled in each round."""
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
        _observe(preparation, job, round, _sources(preparation, job, round, client), total)
        yield total


def _thinned(preparation: Preparation, job: CalibrationJob, thinning: Thinning, client: int | None) -> Iterator[Tensor]:
    """Score what is left round by round, and give up the worst: bool (P,), or the order (P,) where that is kept."""
    net, space, left = preparation.net, preparation.space, None
    row, rounds = space.read(net), thinning.rounds or job.calibration.rounds
    order = _zeros(preparation) if thinning.order and job.sparsity.schedule is not None else None
    for round in range(rounds):
        scores = _zeros(preparation)
        space.write(net, shrunk(row, left, thinning.shrink))
        try:
            if thinning.clients:
                _observe(preparation, job, round, _sources(preparation, job, round, client, left), scores)
            else:
                _observe_alone(preparation, job, scores)
        finally:  # a client whose scores are not finite is left out, and the next one goes on with this network
            space.write(net, row)
        power = (round + 1) / rounds
        kept = thin(scores, left, space, job.sparsity, largest=job.rule.largest, power=power)
        order = None if order is None else ordered(order, left, kept, scores, round)
        left = kept
        if thinning.clients or round == rounds - 1:
            yield left if order is None else order


def _zeros(preparation: Preparation) -> Tensor:
    """A sum before the first round: float64 (P,)."""
    device = preparation.space.tensors(preparation.net)[0].device
    return torch.zeros(preparation.space.size, dtype=torch.float64, device=device)


def _observe_alone(preparation: Preparation, job: CalibrationJob, total: Tensor) -> None:
    """Add what the rule observes of the network alone; the validation split gives the shape of an input, no more."""
    x, y = preparation.take(preparation.dataset.val, np.arange(1))
    job.rule.observe(
        preparation.net,
        preparation.space,
        torch.zeros_like(x),
        torch.zeros_like(y),
        loss=preparation.losses,
        into=total,
    )


def _observe(
    preparation: Preparation, job: CalibrationJob, round: int, sources: Sequence[Source], total: Tensor
) -> None:
    """Add what the rule observes on the batches of all sources to a sum in float64 (P,), where that is finite."""
    before, lost = torch.empty_like(total), set[int]()
    for source in sources:
        before.copy_(total)
        order = generator(preparation.seed, Purpose.CALIBRATION, round, source.owner).permutation(source.part)
        labels = torch_generator(preparation.seed, Purpose.CALIBRATION, round, source.owner)
        for x, y in preparation.batches(source.split, order, job.calibration.batches):
            job.rule.observe(
                preparation.net, preparation.space, x, y, loss=preparation.losses, generator=labels, into=total
            )
        if not bool(total.isfinite().all()):
            total.copy_(before)
            lost.add(source.owner)
    if len(lost) == len(sources):
        raise Diverged(
            "calibration: what is observed is NaN or infinite everywhere, so the run stops; try a smaller "
            "calibration.head_lr, and look at the data's range"
        )
    if lost:
        log.warning("calibration: %s", left_out(lost, "NaN or infinity in what is observed"))


def _sources(
    preparation: Preparation, job: CalibrationJob, round: int, client: int | None, left: Tensor | None = None
) -> list[Source]:
    """One client's shard, the server's validation split, or the shards of those sampled, whose messages are counted.

    Args:
        preparation: what is calibrated on.
        job: the calibration.
        round: its round, from 0.
        client: whose shard; None: those of the round.
        left: bool (P,), what earlier rounds of a thinning left; None: everything is scored.

    """
    train, parts = preparation.dataset.train, preparation.parts
    if client is not None:
        return [Source(train, parts[client], client)]
    if job.calibration.where == "server":
        return [Source(preparation.dataset.val, np.arange(len(preparation.dataset.val.y)), 0)]
    clients = preparation.sample(round, Purpose.CALIBRATION)
    scores, bitmap = exchanged(preparation.space.size, left)
    head = int(preparation.space.where(job.head).sum())
    preparation.ledger.first_model(clients, preparation.model_length)
    preparation.ledger.client_steps += sum(_batches(preparation, job, client) for client in clients)
    dtype = preparation.space.tensors(preparation.net)[0].dtype  # scores travel in it too
    up, down = (known_size(count, 0, dtype).total for count in (scores, head))
    preparation.ledger.setup(len(clients), up=up, down=down + bitmap)
    return [Source(train, parts[client], client) for client in clients]


def _batches(preparation: Preparation, job: CalibrationJob, client: int) -> int:
    """Count the batches that a client goes through in a calibration round."""
    return min(job.calibration.batches, -(-len(preparation.parts[client]) // preparation.batch_size))


def _mask(preparation: Preparation, job: CalibrationJob, observed: Tensor | None, owner: tuple[int, ...]) -> Mask:
    """Choose the coordinates of one mask; random rules draw from a stream of their own for each owner."""
    row = preparation.space.read(preparation.net).cpu()
    stream = torch_generator(preparation.seed, Purpose.MASK, *owner)
    observed = None if observed is None else observed.cpu()
    return choose(job.rule, Evidence(preparation.space, row, job.sparsity.at(0), stream, observed))
