"""What is trained: networks, their samples and rounds, at full size or tiny.

Shapes: P coordinates of the row, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedsparse.bench.problems import vit_small
from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.images import Inputs, unchanged
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import ErrorFeedback
from fedsparse.federation.exchange.sparsifiers import TopK
from fedsparse.models.text import TextClassifier
from fedsparse.models.vision import conv, mlp, vit_digits
from fedsparse.simulation.module import ClientModule

BFLOAT, FLOAT = "bf16-mixed", "32-true"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Draw = Callable[[int, torch.Generator], Tensor]


def masked(trained: Tensor, space: ParamSpace) -> Exchange:
    """Send all that trains."""
    return Exchange(trained, space.local)


def topk(trained: Tensor, space: ParamSpace) -> Exchange:
    """Send the largest tenth, and carry the rest over."""
    return Exchange(trained, space.local, rule=TopK(fraction=0.1), filters={"feedback": ErrorFeedback()})


@dataclass(frozen=True)
class Case:
    """A federation to train, and how.

    Attributes:
        build: builds the network.
        data: its samples, dealt evenly to the clients, who all take part.
        clients: how many; each takes ``steps`` local steps on ``batch`` samples a round.
        rounds: in all, of which the first ``warmup`` do not count.
        cohort: K, the clients that train together.
        precision: of Lightning's.
        density: share of the coordinates that train, drawn at random.
        inputs: turns samples into what the network takes.
        exchange: makes what is sent of a mask (P,) and the space.
        module: the clients' kind of module.
        graph: whether a CUDA graph replays the local steps.

    """

    build: Callable[[], nn.Module]
    data: Dataset
    clients: int
    steps: int = 4
    batch: int = 32
    rounds: int = 3
    warmup: int = 1
    cohort: int = 1
    precision: str = FLOAT
    density: float = 1.0
    inputs: Callable[[Tensor], Tensor] = unchanged
    exchange: Callable[[Tensor, ParamSpace], Exchange] = masked
    module: type[ClientModule] = ClientModule
    graph: bool = True

    def net(self) -> nn.Module:
        """Build the network, every time with the same weights."""
        torch.manual_seed(0)
        return self.build()

    def plan(self, cohort: int) -> RoundPlan:
        """Plan the rounds for cohorts of so many clients."""
        parts = list(np.arange(self.clients * self.steps * self.batch).reshape(self.clients, -1))
        return RoundPlan(parts, LocalWork(self.batch, self.steps), lambda _: range(self.clients), cohort)

    def trained(self, size: int) -> Tensor:
        """Choose what trains, bool (P,)."""
        if self.density == 1.0:
            return torch.ones(size, dtype=torch.bool)
        return torch.rand(size, generator=torch.Generator().manual_seed(1)) < self.density

    @property
    def compares(self) -> bool:
        """Whether the hand-written loop, which is dense, ends at the same weights."""
        return self.density == 1.0 and self.exchange is masked


def synthetic(draw: Draw, size: int, classes: int) -> Dataset:
    """Draw samples and labels at random, a few for validation and test."""
    g = torch.Generator().manual_seed(0)
    splits = [Split(draw(n, g), torch.randint(classes, (n,), generator=g)) for n in (size, 2 * classes, 2 * classes)]
    return Dataset(splits[0], splits[1], splits[2], classes=classes, name="synthetic")


def whole(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype, n: int, g: torch.Generator) -> Tensor:
    """Draw whole numbers, pixels or tokens: (N, *shape)."""
    return torch.randint(low, high, (n, *shape), generator=g, dtype=dtype)


def real(shape: tuple[int, ...], n: int, g: torch.Generator) -> Tensor:
    """Draw standardised images (N, *shape)."""
    return torch.randn(n, *shape, generator=g)


def vit(tiny: bool) -> Case:
    """ViT-S/16 on pixels in bfloat16, 10 clients; or two narrow blocks on images of 32 x 32."""
    clients, steps, batch, side, classes = (3, 2, 4, 32, 10) if tiny else (10, 4, 32, 224, 100)
    draw = partial(whole, (3, side, side), 0, 256, torch.uint8)
    return Case(
        _narrow_vit if tiny else partial(vit_small, classes),
        synthetic(draw, clients * steps * batch, classes),
        clients,
        steps,
        batch,
        rounds=3 if tiny else 8,
        warmup=1 if tiny else 2,
        precision=BFLOAT,
        inputs=Inputs(side, 3, MEAN, STD),
    )


def _narrow_vit() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=2, num_heads=2)


def bert(tiny: bool) -> Case:
    """BERT-base on 128 tokens in bfloat16, 4 clients; or two narrow layers on 16."""
    clients, steps, batch, length, vocabulary = (2, 2, 2, 16, 1000) if tiny else (4, 4, 16, 128, 28996)
    draw = partial(whole, (length,), 5, vocabulary, torch.int32)
    data = synthetic(draw, clients * steps * batch, classes=4)
    return Case(partial(_bert, tiny, vocabulary), data, clients, steps, batch, precision=BFLOAT)


def _bert(tiny: bool, vocabulary: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size: dict[str, Any] = {"vocab_size": vocabulary, "num_labels": 4}
    if tiny:
        size |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # no dropout: the loop would draw other numbers
    config = BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return TextClassifier(BertForSequenceClassification(config).train())


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (partial(mlp, in_features=64, hidden=128, num_classes=10), (1, 8, 8)),
    "conv": (partial(conv, num_classes=10, in_chans=1), (1, 16, 16)),
    "vit_digits": (vit_digits, (1, 8, 8)),
}


def small(model: str, clients: int, rounds: int = 3) -> Case:
    """Make a small network and clients that each take four steps on 32 samples."""
    build, shape = SMALL[model]
    return Case(build, synthetic(partial(real, shape), clients * 4 * 32, classes=10), clients, rounds=rounds)
