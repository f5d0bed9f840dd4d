"""A network as a function of its row: the loss on a split, its gradient and its Hessian's products.

Shapes: P coordinates of the space, of which n are moved; k vectors; N samples, B of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedsparse.core.checks import check_whole
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.core.targets import Weigh
from fedsparse.data.datasets import Split
from fedsparse.data.images import unchanged
from fedsparse.federation.client.bound import Losses
from fedsparse.federation.client.training import Clients, can_stack
from fedsparse.landscape.curvature import MatMat, differentiated
from fedsparse.models.copies import copied
from fedsparse.models.units import compute_all_units

BATCH = 64  # samples whose graph of the gradient is kept
ROOM = 1 << 30  # bytes of such graphs


class Task:
    """What rows are evaluated with: a copy of a network in eval mode, and the losses of its training.

    The network that is handed in keeps its weights, statistics and modes, whatever happens here.

    Args:
        net: the network; parameters outside the space and buffers are as in it.
        space: the coordinates of a row.
        losses: of every sample of a batch: (forward, x, y) -> (B,).
        inputs: turns images into what the network takes.
        per_sample: whether each loss depends on its own sample alone, so that points may be stacked.
        training: samples on which BatchNorm's statistics are computed again at every point: those of one model are
            wrong for another. None: for a network without BatchNorm.
        weigh: weights of the samples in a mean loss, from their targets; None: all are equal.

    Attributes:
        stackable: whether points may be stacked at all.
        like: a tensor with the device and dtype of the network; rows may be stored in another.

    Raises:
        ValueError: BatchNorm without training samples.

    """

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        losses: Losses,
        *,
        inputs: Callable[[Tensor], Tensor] = unchanged,
        per_sample: bool = False,
        training: Split | None = None,
        weigh: Weigh | None = None,
    ) -> None:
        self.net = copied(net).eval().requires_grad_(False)
        compute_all_units(self.net)  # a network that has trained may compute the gradient of some units only
        self.space, self.losses, self.inputs, self.training = space, losses, inputs, training
        self.weigh = weigh
        self.stackable = per_sample and can_stack(net)
        self.like = space.tensors(self.net)[0]
        self.device = self.like.device
        self.norms = [module for module in self.net.modules() if isinstance(module, _BatchNorm)]
        if self.norms and (training is None or not len(training.y)):
            raise ValueError("the model has BatchNorm: its statistics need training samples at every point")

    @classmethod
    def of(cls, clients: Clients, training: Split | None = None) -> Task:
        """Take network and losses of the clients that trained it."""
        return cls(
            clients.net,
            clients.space,
            clients.losses,
            inputs=clients.inputs,
            per_sample=clients.per_sample,
            training=training,
            weigh=clients.weigh,
        )

    def weighted(self, losses: Tensor, y: Tensor) -> Tensor:
        """Multiply losses (B,) of targets (B,) or (B, L) by their weights, whose sum ``total`` divides."""
        return losses if self.weigh is None else losses * self.weigh(y)

    def total(self, split: Split) -> int:
        """Sum the weights of a split; at least 1, as the loss of samples without a target is 0 in training too."""
        return len(split.y) if self.weigh is None else max(1, int(self.weigh(split.y).sum()))

    def batches(self, split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather a split in even batches of at most ``size``, as the network takes them: x (B, ...), y (B,)."""
        for index in torch.arange(len(split.y)).tensor_split(-(-len(split.y) // size)):  # even: no batch of one
            yield self.inputs(split.x[index].to(self.device)), split.y[index].to(self.device)

    @torch.no_grad()
    def load(self, row: Tensor) -> nn.Module:
        """Put a row (P,) into the network, with BatchNorm's statistics computed for it: means over batches.

        As ``torch.optim.swa_utils.update_bn`` does it, but without dropout.
        """
        self.space.write(self.net, row)
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of the batches' statistics
            norm.train(norm.track_running_stats)
        if self.norms and self.training is not None:
            for x, _ in self.batches(self.training, 4 * BATCH):
                self.net(x)
        return self.net.eval()

    def untouched(self) -> AbstractContextManager[None]:
        """Keep the random state: a network of one's own may draw in eval mode too."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])


class MeanLoss:
    """The mean loss of a split as a function of the row, and its derivatives over what moves.

    The mean is that of training and validation: by the task's weights, which ``data.loss_per`` chooses.

    BatchNorm's statistics are those of the row where a derivative is taken, and constants in it.

    Args:
        task: the network and its losses.
        split: the samples.
        mask: bool (P,), what moves; by default everything.
        batch: samples of a batch at most, whose graph of the gradient is kept.

    Attributes:
        subspace: what moves.
        total: sum of the samples' weights, over which their losses are summed.

    Raises:
        ValueError: no samples, nothing moves, or a batch of no sample.

    """

    def __init__(self, task: Task, split: Split, mask: Tensor | None = None, *, batch: int = BATCH) -> None:
        check_whole("batch", batch, 1)
        if not len(split.y):
            raise ValueError("a loss needs at least one sample")
        self.task, self.split, self.batch, self.total = task, split, batch, task.total(split)
        marks = torch.ones(task.space.size, dtype=torch.bool) if mask is None else mask
        self.subspace, self._marks = Subspace(marks.to(task.device)), marks
        self.moved = {name for name, part in task.space.unflatten(marks).items() if bool(part.any())}
        if not self.moved:
            raise ValueError("no coordinate lies inside the mask: there is nothing to differentiate")

    @torch.no_grad()
    def __call__(self, row: Tensor) -> float:
        """Compute the mean loss at a row (P,), summed in float64."""
        with self.task.untouched():
            net, total = self.task.load(row), 0.0
            for x, y in self.task.batches(self.split, self.batch):
                total += float(self.task.weighted(self.task.losses(net, x, y).double(), y).sum())
        return total / self.total

    def gradient(self, row: Tensor) -> Tensor:
        """Compute the gradient at a row (P,): float64 (P,), 0 where nothing moves."""
        total = torch.zeros(self.subspace.size, dtype=torch.float64, device=self.task.device)
        row = row.detach().to(self.task.like)
        leaf = self.subspace.of(row).clone().requires_grad_()
        with self.task.untouched(), torch.enable_grad():
            for loss in self._shares(row, self._state(row)):
                total += torch.autograd.grad(loss(leaf), leaf)[0]
        return self.subspace.spread(total)

    def hessian(self, row: Tensor, retain: bool = False) -> MatMat:
        """Make the products with the Hessian at a row (P,), over what moves: (k, n) -> float64 (k, n).

        Args:
            row: where it is taken.
            retain: keep the gradient's graphs of all batches, for products that come one by one, as in Lanczos: for
                vit_digits on 256 samples a quarter less time, and 130 MB more.

        """
        row = row.detach().to(self.task.like)
        state, values = self._state(row), self.subspace.of(row)

        def graphs() -> Iterator[MatMat]:
            return (differentiated(loss, values) for loss in self._shares(row, state))

        with self.task.untouched():
            kept = list(graphs()) if retain else None

        def products(vectors: Tensor) -> Tensor:
            total = torch.zeros_like(vectors, dtype=torch.float64, device=self.task.device)
            with self.task.untouched():
                for graph in graphs() if kept is None else kept:
                    total += graph(vectors)
            return total

        return products

    def fitted(self, row: Tensor, room: int = ROOM) -> tuple[MeanLoss, bool]:
        """Fit the batch into memory: what a sample adds to the graph of the gradient is measured on one and two.

        Args:
            row: any model (P,).
            room: bytes of graphs at once.

        Returns:
            The loss with a batch that fits, and whether the graphs of all batches fit together.

        """
        one, two = (self._graph_bytes(row, samples) for samples in (1, 2))
        fitting = room // max(1, two - one)
        loss = MeanLoss(self.task, self.split, self._marks, batch=max(1, min(self.batch, fitting)))
        return loss, len(self.split.y) <= fitting

    def _graph_bytes(self, row: Tensor, samples: int) -> int:
        """Count the bytes that the graph of the gradient of a few samples keeps."""
        kept = dict[int, int]()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        index = torch.arange(samples) % len(self.split.y)
        few = Split(self.split.x[index], self.split.y[index])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            MeanLoss(self.task, few, self._marks).hessian(row, retain=True)
        return sum(kept.values())

    def _state(self, row: Tensor) -> dict[str, Tensor]:
        """All that the network computes with at a row, by name."""
        with self.task.untouched():
            buffers = self.task.load(row).named_buffers()
        return {name: buffer.clone() for name, buffer in buffers} | self.task.space.unflatten(row)

    def _shares(self, row: Tensor, state: Mapping[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Each batch's share of the mean loss, as a function of what moves (n,)."""
        for x, y in self.task.batches(self.split, self.batch):
            yield partial(self._share, row, state, x, y)

    def _share(self, row: Tensor, state: Mapping[str, Tensor], x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        """Sum a batch's weighted losses, over the total; a tensor of which nothing moves stays outside the graph."""
        index, space = self.subspace.index, self.task.space
        whole = values if index is None else row.index_copy(0, index.long(), values)
        tensors = {**state, **{name: t for name, t in space.unflatten(whole).items() if name in self.moved}}
        losses = self.task.losses(lambda z: functional_call(self.task.net, tensors, (z,)), x, y)
        return self.task.weighted(losses, y).sum() / self.total
