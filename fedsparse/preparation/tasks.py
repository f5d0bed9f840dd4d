"""What a client computes before the first round: a gradient or statistics for the head, scores for the mask.

Shapes: P coordinates of the space, D features and C classes of the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.core.seeding import Purpose, generator, torch_generator
from fedsparse.core.space import Patterns, parameters_of
from fedsparse.data.datasets import Split
from fedsparse.federation.exchange.wire.message import decode_mask, encode, encode_mask, encode_tensors, read
from fedsparse.masks import MaskRule
from fedsparse.masks.thinning import shrunk
from fedsparse.models.head import Statistics, features, head_of, statistics_of
from fedsparse.models.modes import evaluating

if TYPE_CHECKING:
    from fedsparse.preparation.preparation import Preparation


@dataclass(frozen=True)
class HeadGradient:
    """The gradient of the head alone on one batch, of the loss in evaluation mode.

    Args:
        head: patterns of the head's parameters.
        round: step of the probe, from 0.

    """

    head: Patterns
    round: int

    def run(self, preparation: Preparation, client: int) -> tuple[Tensor, ...]:
        """Compute a client's gradients, one of each parameter of the head."""
        part, parameters = preparation.parts[client], parameters_of(preparation.net, self.head)
        stream = generator(preparation.seed, Purpose.HEAD, self.round, client)
        x, y = preparation.take(preparation.dataset.train, stream.permutation(part)[: preparation.batch_size])
        with evaluating(preparation.net):
            return torch.autograd.grad(preparation.losses(preparation.net, x, y).mean(), parameters)

    def down(self, preparation: Preparation) -> tuple[bytes, ...]:
        """Write what the server sends: the head."""
        return (encode_tensors(parameters_of(preparation.net, self.head)),)

    @contextmanager
    def received(self, preparation: Preparation, parts: Sequence[bytes]) -> Iterator[None]:
        """Load what the server sent."""
        load(parameters_of(preparation.net, self.head), parts[0])
        yield

    def up(self, answer: Sequence[Tensor]) -> bytes:
        """Write what a client sends."""
        return encode_tensors(answer)

    def answer(self, preparation: Preparation, message: bytes) -> tuple[Tensor, ...]:
        """Read what a client sent."""
        return read_like(message, parameters_of(preparation.net, self.head))


@dataclass(frozen=True)
class HeadStatistics:
    """The statistics of a client's features for the closed-form head, float64, over all its samples.

    Args:
        head: patterns of the head's parameters.
        round: 0, as there is one.

    """

    head: Patterns
    round: int = 0

    def run(self, preparation: Preparation, client: int) -> tuple[Tensor, ...]:
        """Sum a client's statistics, batch by batch."""
        layer, train = head_of(preparation.net, self.head), preparation.dataset.train
        batches = preparation.batches(train, preparation.parts[client])
        pairs = ((features(preparation.net, layer, x), y) for x, y in batches)
        return statistics_of(pairs, layer.out_features).tensors

    def down(self, preparation: Preparation) -> tuple[bytes, ...]:
        """Write what the server sends: nothing but the first model."""
        return ()

    @contextmanager
    def received(self, preparation: Preparation, parts: Sequence[bytes]) -> Iterator[None]:
        """Load nothing."""
        yield

    def up(self, answer: Sequence[Tensor]) -> bytes:
        """Write what a client sends."""
        return encode_tensors(answer)

    def answer(self, preparation: Preparation, message: bytes) -> tuple[Tensor, ...]:
        """Read what a client sent."""
        layer = head_of(preparation.net, self.head)
        shapes = Statistics.shapes(layer.in_features, layer.out_features)
        return read_like(message, [torch.zeros(shape, dtype=torch.float64) for shape in shapes])


@dataclass(frozen=True)
class Observation:
    """The scores of a mask rule, summed over a client's batches of one calibration round.

    Args:
        rule: observes batches.
        head: patterns of the head's parameters.
        round: calibration round, from 0.
        batches: most batches.
        left: bool (P,), coordinates that a thinning still scores; None: all.
        shrink: factor of the values that it has given up.

    """

    rule: MaskRule
    head: Patterns
    round: int
    batches: int
    left: Tensor | None = None
    shrink: float = 1.0

    def run(self, preparation: Preparation, client: int) -> tuple[Tensor, ...]:
        """Sum a client's scores, (P,), in the dtype in which they travel."""
        total = self.of(preparation, preparation.dataset.train, preparation.parts[client], client)
        return (total.to(self.dtype(preparation)),)

    def of(self, preparation: Preparation, split: Split, part: np.ndarray, owner: int) -> Tensor:
        """Sum scores over samples, float64 (P,); ``owner`` keys the random streams."""
        device = preparation.space.tensors(preparation.net)[0].device
        total = torch.zeros(preparation.space.size, dtype=torch.float64, device=device)
        order = generator(preparation.seed, Purpose.CALIBRATION, self.round, owner).permutation(part)
        labels = torch_generator(preparation.seed, Purpose.CALIBRATION, self.round, owner)
        for x, y in preparation.batches(split, order, self.batches):
            self.rule.observe(
                preparation.net, preparation.space, x, y, loss=preparation.losses, generator=labels, into=total
            )
        return total

    def dtype(self, preparation: Preparation) -> torch.dtype:
        """Choose the dtype of the scores: the network's, and no narrower than float32, which would tie them."""
        return torch.promote_types(preparation.space.tensors(preparation.net)[0].dtype, torch.float32)

    def down(self, preparation: Preparation) -> tuple[bytes, ...]:
        """Write what the server sends: the head, and from a thinning's second round what is left."""
        head = encode_tensors(parameters_of(preparation.net, self.head))
        return (head, *(() if self.left is None else (encode_mask(self.left),)))

    @contextmanager
    def received(self, preparation: Preparation, parts: Sequence[bytes]) -> Iterator[None]:
        """Load what the server sent; what a thinning has given up is shrunk meanwhile."""
        net, space = preparation.net, preparation.space
        load(parameters_of(net, self.head), parts[0])
        row = space.read(net)
        space.write(net, shrunk(row, self.left, self.shrink))
        yield
        space.write(net, row)

    def up(self, answer: Sequence[Tensor]) -> bytes:
        """Write what a client sends."""
        return encode(answer[0] if self.left is None else answer[0][self.left])

    def answer(self, preparation: Preparation, message: bytes) -> tuple[Tensor, ...]:
        """Read what a client sent."""
        return (read(message, preparation.space.size, mask=self.left, dtype=self.dtype(preparation)).values,)


ClientTask = HeadGradient | HeadStatistics | Observation


def left_of(parts: Sequence[bytes], size: int) -> Tensor | None:
    """Read what a thinning has left, bool (P,), of the messages of an ``Observation``; None in its first round."""
    return decode_mask(parts[1], size) if len(parts) > 1 else None


def read_like(message: bytes, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Read the message of tensors with these shapes and one dtype.

    Raises:
        PayloadError: the message is damaged, or has other tensors.

    """
    sizes = [tensor.numel() for tensor in like]
    values = read(message, sum(sizes), dtype=like[0].dtype).values
    return tuple(v.view(t.shape).to(t.device) for v, t in zip(values.split(sizes), like, strict=True))


@torch.no_grad()
def load(parameters: Sequence[nn.Parameter], message: bytes) -> None:
    """Copy the tensors of a message into parameters.

    Raises:
        PayloadError: the message is damaged, or has other tensors.

    """
    for parameter, value in zip(parameters, read_like(message, parameters), strict=True):
        parameter.copy_(value)
