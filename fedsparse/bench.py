"""A round's time over that of a hand-written loop, in pairs: ``python -m fedsparse.bench [--models mlp conv ...]``.

Both do the same work on the same batches and end at the same weights. After warm-up rounds, each round here
is followed by one of the hand-written loop in the same process, so that the machine's drift meets both alike.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import wandb
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.aggregation import WeightedMean
from fedsparse.federation.artifacts import wandb_logger
from fedsparse.federation.checkpoint import AtomicCheckpointIO, RoundCheckpoint
from fedsparse.federation.client import ClientModule
from fedsparse.federation.csv import RoundCSV
from fedsparse.federation.evaluation import Evaluation
from fedsparse.federation.exchange import Full
from fedsparse.federation.progress import RoundProgress
from fedsparse.federation.rounds import FederatedRounds
from fedsparse.federation.sampling import everyone
from fedsparse.federation.topology import Flat
from fedsparse.federation.tracking import RoundLog
from fedsparse.models.convnets import resnet18_gn
from fedsparse.models.vision import conv, mlp
from fedsparse.optim import SparseSGDM
from fedsparse.space import ParamSpace

CLIENTS, STEPS, LR, MOMENTUM = 10, 4, 0.05, 0.9
BARE, UNVALIDATED, EVERYTHING = "bytes, csv", "all but validation", "everything"
SETTINGS = (BARE, UNVALIDATED, EVERYTHING)
Batches = list[list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Problem:
    """A model, its samples, and how often it is measured.

    Attributes:
        name: of the model.
        net: builds it.
        shape: of a sample.
        batch: samples of a local step.
        pairs: rounds that count.
        warmup: rounds before them.
        settings: what runs beside training.

    """

    name: str
    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 32
    pairs: int = 30
    warmup: int = 5
    settings: tuple[str, ...] = SETTINGS


def _vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4)


def _vit_small() -> nn.Module:
    return VisionTransformer(num_classes=10, embed_dim=384, depth=12, num_heads=6)


def _mlp_large() -> nn.Module:
    """Build 4.3 million weights in three dense layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1664), nn.ReLU(), nn.Linear(1664, 1792), nn.ReLU(), nn.Linear(1792, 10)
    )


_FEW: dict[str, Any] = {"pairs": 5, "warmup": 1, "settings": (BARE,)}  # a round of these takes seconds

PROBLEMS = {
    "mlp": Problem("mlp", partial(mlp, in_features=64, hidden=128, num_classes=10, seed=0), (1, 8, 8)),
    "conv": Problem("conv", partial(conv, num_classes=10, in_chans=1, seed=0), (1, 16, 16)),
    "vit": Problem("vit", _vit, (1, 8, 8)),
    "mlp_large": Problem("mlp_large", _mlp_large, (1, 28, 28), pairs=15, settings=(BARE,)),
    "resnet18_gn": Problem("resnet18_gn", partial(resnet18_gn, num_classes=10), (3, 32, 32), batch=4, **_FEW),
    "vit_small": Problem("vit_small", _vit_small, (3, 224, 224), batch=2, **_FEW),
}


@dataclass(frozen=True)
class Result:
    """Medians over the pairs, in milliseconds a round, and the ratio's median, least and greatest."""

    model: str
    setting: str
    hand_ms: float
    fedsparse_ms: float
    ratio: float
    ratio_min: float
    ratio_max: float
    extra_ms_per_cohort: float
    weights_differ: float


class HandWritten:
    """The same rounds as a person would write them: one model, torch's SGD at its fastest, in-place copies.

    Args:
        net: a network of its own.
        batches: for every client its local batches, gathered beforehand.
        options: of ``torch.optim.SGD``, such as ``fused`` or ``foreach``.

    """

    def __init__(self, net: nn.Module, batches: Batches, **options: bool) -> None:
        self.net, self.batches = net.train(), batches
        self.parameters: list[Tensor] = list(net.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, **options)

    def round(self) -> None:
        """Train every client and average."""
        torch._foreach_zero_(self.sums)
        for batches in self.batches:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.start)
            self.optimizer.state.clear()
            for x, y in batches:
                F.cross_entropy(self.net(x), y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_add_(self.sums, self.parameters, alpha=1.0 / len(self.batches))
        torch._foreach_copy_(self.start, self.sums)


class Pairs(lightning.Callback):
    """Times each round from its start to the next one's, and runs the hand-written loop in between."""

    def __init__(self, hand: HandWritten, batches_of: Callable[[int], Batches], warmup: int) -> None:
        self.hand, self.batches_of, self.warmup = hand, batches_of, warmup
        self.fedsparse: list[float] = []
        self.written: list[float] = []
        self.resumed = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the pair of the round before; the time of the hand-written loop counts for nobody else."""
        ours = time.perf_counter() - self.resumed
        if trainer.current_epoch > 0:
            self.hand.batches = self.batches_of(trainer.current_epoch - 1)
            theirs = _timed(self.hand.round)
            if trainer.current_epoch > self.warmup:
                self.fedsparse.append(ours)
                self.written.append(theirs)
        self.resumed = time.perf_counter()


def measure(problem: Problem, setting: str, folder: Path) -> Result:
    """Run both on one problem.

    Args:
        problem: the model, and how often it is measured.
        setting: one of ``SETTINGS``.
        folder: for what the run writes.

    """
    torch.manual_seed(0)
    net = problem.net()
    dataset, plan = _data(problem), _plan(problem)

    def batches_of(round: int) -> Batches:
        return [[(dataset.train.x[s], dataset.train.y[s]) for s in c.samples[0]] for c in plan.cohorts(round)]

    hand = HandWritten(copy.deepcopy(net), batches_of(0), **_fastest(problem, batches_of(0)))
    module, federation = _federation(net)
    pairs = Pairs(hand, batches_of, problem.warmup)
    total = problem.pairs + problem.warmup + 1
    _trainer(federation, pairs, total, setting, folder).fit(module, FederatedDataModule(dataset, plan))
    if wandb.run is not None:
        wandb.run.finish()
    hand.batches = batches_of(total - 1)  # the last round, which no next round closes
    hand.round()
    return _result(problem.name, setting, pairs, _difference(module, hand))


def _result(name: str, setting: str, pairs: Pairs, difference: float) -> Result:
    """Take medians over the pairs."""
    ratios = [a / b for a, b in zip(pairs.fedsparse, pairs.written, strict=True)]
    extra = [(a - b) / CLIENTS for a, b in zip(pairs.fedsparse, pairs.written, strict=True)]
    median = statistics.median
    return Result(
        name,
        setting,
        1e3 * median(pairs.written),
        1e3 * median(pairs.fedsparse),
        median(ratios),
        min(ratios),
        max(ratios),
        1e3 * median(extra),
        difference,
    )


def _difference(module: ClientModule, hand: HandWritten) -> float:
    """Largest difference of the final weights."""
    row = torch.cat([t.reshape(-1) for t in hand.start])
    return float((module.server.rows[0] - row).abs().max())


def _fastest(problem: Problem, batches: Batches) -> dict[str, bool]:
    """Choose the fastest of torch's implementations of SGD for this model."""
    trials: dict[float, dict[str, bool]] = {}
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        trial = HandWritten(problem.net(), batches[:3], **options)
        trial.round()
        times = [_timed(trial.round) for _ in range(5)]
        trials[min(times)] = options
    return trials[min(trials)]


def _timed(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _data(problem: Problem) -> Dataset:
    """Random samples of the problem's shape, labels of ten classes."""
    g = torch.Generator().manual_seed(0)
    sizes = (CLIENTS * STEPS * problem.batch, 256, 256)
    splits = [Split(torch.randn(n, *problem.shape, generator=g), torch.randint(10, (n,), generator=g)) for n in sizes]
    return Dataset(splits[0], splits[1], splits[2], classes=10, name=problem.name)


def _plan(problem: Problem) -> RoundPlan:
    parts = list(np.arange(CLIENTS * STEPS * problem.batch).reshape(CLIENTS, -1))
    sample = partial(everyone, eligible=range(CLIENTS), count=CLIENTS, seed=0)
    return RoundPlan(parts, LocalWork(problem.batch, STEPS), sample)


def _federation(net: nn.Module) -> tuple[ClientModule, FederatedRounds]:
    """Build K = 1 clients and the protocol, dense, ``exchange=full``."""
    space = ParamSpace.of(net)
    trained = torch.ones(space.size, dtype=torch.bool)
    server = partial(torch.optim.SGD, lr=1.0)
    module = ClientModule(net, space, trained, partial(SparseSGDM, lr=LR, momentum=MOMENTUM), server)
    return module, FederatedRounds(Full(trained=trained, local=space.local), WeightedMean(), Flat())


def _trainer(federation: FederatedRounds, pairs: Pairs, rounds: int, setting: str, folder: Path) -> lightning.Trainer:
    """Build the trainer: bytes and csv always, the rest if asked for."""
    evaluation = Evaluation()
    callbacks: list[Any] = [federation, evaluation, RoundLog(federation, evaluation), pairs]
    loggers: list[Any] = [RoundCSV(folder)]
    everything, validated = setting != BARE, setting == EVERYTHING
    if everything:
        terminal = Console(file=io.StringIO(), force_terminal=True)
        callbacks.append(RoundProgress(federation, evaluation, CLIENTS, terminal))
        best = RoundCheckpoint(folder, "best", monitor="val/acc", mode="max", save_on_train_epoch_end=True)
        callbacks += [*([best] if validated else []), RoundCheckpoint(folder, "last", save_on_train_epoch_end=True)]
        loggers.append(wandb_logger(offline=True, project="fedsparse-bench", save_dir=folder))
    return lightning.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        limit_val_batches=None if validated else 0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        enable_checkpointing=everything,
        default_root_dir=folder,
    )


def print_results(results: Sequence[Result]) -> None:
    """Show the pairs as a table."""
    table = Table(title=f"{CLIENTS} clients x {STEPS} local steps a round, K = 1", title_justify="left")
    for column in ("model", "with", "loop ms", "fedsparse ms", "ratio", "spread", "more ms/cohort"):
        table.add_column(column, justify="left" if column in ("model", "with") else "right")
    for r in results:
        spread = f"{r.ratio_min:.2f}-{r.ratio_max:.2f}"
        numbers = (
            f"{r.hand_ms:.1f}",
            f"{r.fedsparse_ms:.1f}",
            f"{r.ratio:.2f}",
            spread,
            f"{r.extra_ms_per_cohort:.2f}",
        )
        table.add_row(r.model, r.setting, *numbers)
    console = Console()
    console.print(table, width=max(100, console.width))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--pairs", type=int, help="pairs that count, instead of the model's own number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    problems = [PROBLEMS[name] for name in options.models]
    if options.pairs:
        problems = [replace(problem, pairs=options.pairs) for problem in problems]
    for problem in problems:
        for setting in problem.settings:
            with tempfile.TemporaryDirectory() as folder:
                results.append(measure(problem, setting, Path(folder)))
    print_results(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
