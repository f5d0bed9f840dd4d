"""What is measured: models, their samples, and the batches of every round, equal for all runners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.models.convnets import resnet18_gn
from fedsparse.models.vision import conv, mlp

CLIENTS, STEPS, LR, MOMENTUM, CLASSES = 10, 4, 0.05, 0.9, 10
BARE, UNVALIDATED, EVERYTHING = "bytes, csv", "all but validation", "everything"
SETTINGS = (BARE, UNVALIDATED, EVERYTHING)
BLOCKS = "bytes, csv, aggregation.block=8"
Batches = list[list[tuple[Tensor, Tensor]]]  # of every client, its local steps


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
        cohorts: bounds of the clients that train together, unless others are asked for.
        peers: whether peers are measured on it without being asked to.

    """

    name: str
    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 32
    pairs: int = 30
    warmup: int = 5
    settings: tuple[str, ...] = SETTINGS
    cohorts: tuple[int, ...] = (1, CLIENTS)
    peers: bool = True


@dataclass(frozen=True)
class Task:
    """A problem with its data, for one runner.

    Attributes:
        problem: what is trained.
        rounds: how many.
        cohort: bound of the clients that train together; for fedsparse alone.

    """

    problem: Problem
    rounds: int
    cohort: int = 1

    @cached_property
    def dataset(self) -> Dataset:
        """Random samples of the problem's shape, labels of ten classes."""
        g, shape = torch.Generator().manual_seed(0), self.problem.shape
        sizes = (CLIENTS * STEPS * self.problem.batch, 256, 256)
        splits = [Split(torch.randn(n, *shape, generator=g), torch.randint(CLASSES, (n,), generator=g)) for n in sizes]
        return Dataset(splits[0], splits[1], splits[2], classes=CLASSES, name=self.problem.name)

    def net(self) -> nn.Module:
        """Build the network, every time with the same weights."""
        torch.manual_seed(0)
        return self.problem.net()

    def plan(self, cohort: int) -> RoundPlan:
        """Deal the samples evenly; all clients take part in every round."""
        parts = list(np.arange(CLIENTS * STEPS * self.problem.batch).reshape(CLIENTS, -1))
        return RoundPlan(parts, LocalWork(self.problem.batch, STEPS), lambda _: range(CLIENTS), cohort)

    def batches(self, round: int) -> Batches:
        """Gather what every client trains on in a round, whatever the cohort."""
        x, y = self.dataset.train.x, self.dataset.train.y
        return [[(x[s], y[s]) for s in cohort.samples[0]] for cohort in self.plan(1).cohorts(round)]


def vit_small(classes: int) -> nn.Module:
    """Build the published ViT-S/16 with random weights."""
    return timm.create_model("vit_small_patch16_224", num_classes=classes)


def _vit() -> nn.Module:
    """Build a small vision transformer for images of 8 x 8."""
    size: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1}
    return VisionTransformer(**size, num_classes=CLASSES, embed_dim=64, depth=4, num_heads=4)


def _mlp_large() -> nn.Module:
    """Build 4.3 million weights in three dense layers."""
    layers = nn.Linear(784, 1664), nn.ReLU(), nn.Linear(1664, 1792), nn.ReLU(), nn.Linear(1792, CLASSES)
    return nn.Sequential(nn.Flatten(), *layers)


_FEW: dict[str, Any] = {"pairs": 5, "warmup": 1, "settings": (BARE,), "cohorts": (1,)}  # a round takes long
_LONG = _FEW | {"peers": False}  # a round takes many seconds

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("mlp", partial(mlp, in_features=64, hidden=128, num_classes=CLASSES, seed=0), (1, 8, 8)),
        Problem("conv", partial(conv, num_classes=CLASSES, in_chans=1, seed=0), (1, 16, 16)),
        Problem("conv_digits", partial(conv, num_classes=CLASSES, in_chans=1, seed=0), (1, 8, 8), settings=(BARE,)),
        Problem("vit", _vit, (1, 8, 8)),
        Problem("mlp_large", _mlp_large, (1, 28, 28), **_FEW | {"settings": (BARE, BLOCKS)}),
        Problem("resnet18_gn", partial(resnet18_gn, num_classes=CLASSES), (3, 32, 32), batch=4, **_LONG),
        Problem("vit_small", partial(vit_small, CLASSES), (3, 224, 224), batch=2, **_LONG),
    )
}
