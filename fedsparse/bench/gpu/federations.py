"""A federation of plain objects in this process, alone or in pairs of rounds with the hand-written loop.

Shapes: P coordinates of the row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn

from fedsparse.bench.gpu.cases import BFLOAT, Case
from fedsparse.bench.gpu.device import peak_mb, reset_peak, sync
from fedsparse.bench.gpu.parts import Parts
from fedsparse.bench.gpu.session import Figures, OutOfTime, ms
from fedsparse.bench.loop import SGDS, HandWritten
from fedsparse.bench.pairs import Clock, Times
from fedsparse.bench.problems import LR, MOMENTUM, Batches
from fedsparse.core.space import ParamSpace
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.rounds import Cohort
from fedsparse.federation.federation import Federation
from fedsparse.federation.server.aggregation import WeightedMean
from fedsparse.federation.server.topology import Flat
from fedsparse.optim.sgdm import SparseSGDM
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.module import ClientModule

Watchers = Sequence[lightning.Callback]


class Prepared(nn.Module):
    """A network with its inputs prepared and its forward in the case's precision, as the loop calls it."""

    def __init__(self, net: nn.Module, case: Case, device: torch.device) -> None:
        super().__init__()
        self.net, self.inputs, self.device, self.low = net, case.inputs, device, case.precision == BFLOAT

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits in float32."""
        # each weight is used once, so that its copy need not be kept; nor may it be while a CUDA graph is captured
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low, cache_enabled=False):
            logits: Tensor = self.net(self.inputs(x))
        return logits.float()


class Loop:
    """The hand-written loop on the device, with torch's fused SGD.

    Attributes:
        peak: of memory in its last round, in MiB; the runner's network and data lie beside it.

    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.hand = HandWritten(Prepared(case.net().to(device), case, device), SGDS[0])
        self.x, self.y = case.data.train.held.to(device), case.data.train.y.to(device)
        self.plan, self.device = case.plan(1), device
        self.peak: int | None = None

    def batches(self, round: int) -> Batches:
        """Make those of a round, each gathered when its turn comes, within the loop's time, as the runner does."""
        return cast(Batches, [self._steps(cohort) for cohort in self.plan.cohorts(round)])

    def _steps(self, cohort: Cohort) -> Iterator[tuple[Tensor, Tensor]]:
        for index in cohort.to(self.device).samples[0]:
            yield self.x[index], self.y[index]

    def round(self, batches: Batches) -> None:
        """Train and average, until the device is done."""
        reset_peak(self.device)
        self.hand.round(batches)
        sync(self.device)
        self.peak = peak_mb(self.device)


class Ticks(lightning.Callback):
    """Begins each round of the clock when the device is done with the one before."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock, self.device = clock, device

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """An epoch is a round."""
        self._tick()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the last round."""
        self._tick()

    def _tick(self) -> None:
        sync(self.device)
        self.clock.tick()


class Peak(lightning.Callback):
    """Peak of memory over the rounds of the runner alone; stands last, behind the loop's round and the protocol."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mb: int | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave out what the loop took."""
        reset_peak(self.device)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Look at the peak."""
        now = peak_mb(self.device)
        self.mb = now if self.mb is None or now is None else max(self.mb, now)


class Deadline(lightning.Callback):
    """Ends the training when a pair of rounds takes longer than what is left."""

    def __init__(self, left: Callable[[], float]) -> None:
        self.left, self.before = left, left()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare the time that is left with that of the last pair."""
        left = self.left()
        if left < self.before - left:
            trainer.should_stop = True
        self.before = left


@dataclass(frozen=True)
class Ran:
    """A federation that has run.

    Attributes:
        times: of the rounds that count.
        row: the global model (P,).
        peak: of the runner's memory, in MiB.

    """

    times: Times
    row: Tensor
    peak: int | None


def federation(case: Case, parts: Parts | None = None) -> tuple[ClientModule, FederatedRounds]:
    """Build clients and protocol, of whom ``parts`` times both."""
    net = case.net()
    space = ParamSpace.of(net)
    trained = case.trained(space.size)
    make_optimizer = partial(SparseSGDM, lr=LR, momentum=MOMENTUM)
    make_module = partial(case.module, cohort=case.cohort, inputs=case.inputs, graph=case.graph)
    federate = partial(Federation, exchange=case.exchange(trained, space), aggregation=WeightedMean(), topology=Flat())
    if parts is not None:
        make_module = partial(make_module, objective=parts.training)
        federate = partial(federate, watchers=[parts.taking])
    return make_module(net, space, trained, make_optimizer), FederatedRounds(federate)


def train(case: Case, device: torch.device, clock: Clock, before: Watchers = (), parts: Parts | None = None) -> Ran:
    """Train a federation.

    Args:
        case: the federation.
        device: where.
        clock: is told when a round begins.
        before: callbacks in front of the protocol.
        parts: times clients and what follows them.

    """
    module, rounds = federation(case, parts)
    peak = Peak(device)
    trainer = lightning.Trainer(
        max_epochs=case.rounds,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=case.precision,  # type: ignore[arg-type]
        callbacks=[Ticks(clock, device), *before, rounds, peak],
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, FederatedDataModule(case.data, case.plan(case.cohort)))
    return Ran(clock.times, rounds.federation.server.rows[0].detach(), peak.mb)


def alone(case: Case, device: torch.device, before: Watchers = ()) -> Ran:
    """Train a federation without the loop."""
    clock = Clock(lambda round: [], {}, lambda batches: None, range(case.warmup, case.rounds))
    return train(case, device, clock, before)


def alone_figures(ran: Ran) -> Figures:
    """Time and memory of a federation that ran alone."""
    return {"rounds": len(ran.times.runner), "fedsparse_ms": ms(ran.times.runner), "peak_mb": ran.peak}


def beside(
    case: Case,
    device: torch.device,
    left: Callable[[], float] = lambda: math.inf,
    before: Watchers = (),
    parts: Parts | None = None,
) -> Figures:
    """Train a federation in pairs of rounds with the loop: times, memory, and how far apart both end.

    Args:
        case: the federation.
        device: where.
        left: seconds that are left; fewer pairs are measured if they do not suffice.
        before: callbacks in front of the protocol.
        parts: times clients and what follows them.

    Raises:
        OutOfTime: no pair could be measured.

    """
    loop = Loop(case, device)
    clock = Clock(loop.batches, SGDS[0], loop.round, range(case.warmup, case.rounds))
    ran = train(case, device, clock, [*before, Deadline(left)], parts)
    if not ran.times.runner:
        raise OutOfTime("the rounds that warm up took the time that was left")
    figures = _paired(ran.times) | {"peak_mb_beside_the_loop": ran.peak, "hand_peak_mb_beside": loop.peak}
    return figures | ({"weights_relative": relative(ran.row, loop.hand.weights)} if case.compares else {})


def _paired(times: Times) -> Figures:
    """Medians over the pairs."""
    ratios = [runner / hand for runner, hand in zip(times.runner, times.hand, strict=True)]
    return {
        "rounds": len(ratios),
        "fedsparse_ms": ms(times.runner),
        "hand_ms": ms(times.hand),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_of_least": round(min(times.runner) / min(times.hand), 3),
    }


def relative(row: Tensor, other: Tensor) -> float:
    """Distance of a row (P,) to another, by the other's length."""
    return float((row - other).norm() / other.norm())
