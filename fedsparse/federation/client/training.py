"""Local training of K clients, the rows of one tensor; without Trainer, data module and server.

Shapes: K clients of the cohort, P coordinates of which n train, S local steps, B samples of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsparse.core.seeding import Purpose, number
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Carry, Subspace
from fedsparse.core.targets import Weigh
from fedsparse.core.transfer import read
from fedsparse.data.images import unchanged
from fedsparse.data.rounds import Cohort
from fedsparse.federation.client.bound import BoundRow, Forward, Losses
from fedsparse.federation.client.buffers import Buffers
from fedsparse.federation.client.drift import (
    VARIATES,
    DriftCorrection,
    GradientCorrection,
    NoCorrection,
    Rows,
    step_weights,
)
from fedsparse.federation.client.early_stopping import Counts, Patience
from fedsparse.federation.client.graphs import LONGEST, Graphs
from fedsparse.federation.client.stacked import StackedRows
from fedsparse.federation.client.whole import WholeRow
from fedsparse.federation.exchange.update import Start, Update, finite, subtract
from fedsparse.federation.schedule import Within
from fedsparse.masks.bitmaps import unpack
from fedsparse.optim.index import LARGE, Block, blocks
from fedsparse.optim.masked import MaskedOptimizer

LOCAL = "clients"  # the store of local coordinates
LOSS_SCALE, SMALLEST_SCALE = 1024.0, 2.0**-8

Batch = tuple[Tensor, Tensor]
MakeClientOptimizer = Callable[[list[Tensor]], MaskedOptimizer]
Precision = Callable[[], AbstractContextManager[Any]]


class Clients:
    """Trains the clients of a cohort of K.

    With K = 1 the network's parameters are views into the row, so that any module trains without a copy (``BoundRow``,
    on a GPU ``WholeRow``).
    With K > 1 the rows train together (``StackedRows``).

    Args:
        net: the network, on the device where it trains.
        space: which of its tensors are federated.
        mask: bool (P,), True where a coordinate trains.
        make_optimizer: builds the optimizer of a list of tensors; its masks are set afterwards.
        losses: of every sample of one client's batch: (forward, x, y) -> (B,).
        fetch: gathers the samples of a cohort's steps: x (K, S, B, ...) and y (K, S, B).
        cohort: K.
        clip_norm: largest L2 norm of a client's gradient over its trained coordinates, or None.
        inputs: transforms images of any leading dimensions into the network's inputs.
        compile: whether torch compiles the network for the local steps.
        objective: the drift correction; none by default.
        buffers: policy and values of the float buffers; averaged by default.
        bitmaps: uint8 (N, ceil(P / 8)), the masks of N clients; empty if all train ``mask``.
        per_sample: whether each loss depends on one sample only, so that stacked clients' batches may be joined.
        loss_scale: factor of the loss in half precision, so that gradients do not underflow.
        precision: context of the local training, such as an autocast.
        weigh: weights of the samples in a batch's mean loss, from their targets; None: all are equal.
        seed: the run's seed, for dropout.
        large: coordinates from which a tensor is a block of its own (K = 1, on a CPU), as copying its gradient takes
            long.
        graph: whether a CUDA graph replays the local steps, where that is possible.
        decay: factor of the learning rate by local step, from 0, and a client's number of local steps; None: 1.

    Attributes:
        theta: the rows (K, P).
        subspace: the coordinates that train.
        local: bool (n,), trained coordinates that stay with each client; None if there are none.
        frozen: bool (P,) or (K, P), coordinates that clipping leaves out; None without clipping or if all train.
        lr: learning rate that the optimizer was built with.

    Raises:
        ValueError: K > 1 with BatchNorm, whose running statistics cannot be stacked.

    """

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        mask: Tensor,
        make_optimizer: MakeClientOptimizer,
        losses: Losses,
        fetch: Callable[[Cohort], Batch],
        *,
        cohort: int = 1,
        clip_norm: float | None = None,
        inputs: Callable[[Tensor], Tensor] = unchanged,
        compile: bool = False,
        objective: DriftCorrection | None = None,
        buffers: Buffers | None = None,
        bitmaps: Tensor | None = None,
        per_sample: bool = False,
        loss_scale: float = 1.0,
        precision: Precision = nullcontext,
        weigh: Weigh | None = None,
        seed: int = 0,
        large: int = LARGE,
        graph: bool = False,
        decay: Within | None = None,
    ) -> None:
        check_stackable(net, cohort)
        self.net, self.space, self.cohort, self.clip_norm = net, space, cohort, clip_norm
        self.make_optimizer, self.losses, self.fetch, self.inputs = make_optimizer, losses, fetch, inputs
        self.forward: Forward = torch.compile(net, dynamic=False) if compile else net  # evaluation calls the net itself
        self.objective = NoCorrection() if objective is None else objective
        self.buffers = Buffers(net) if buffers is None else buffers
        self.bitmaps = torch.zeros(0, 0, dtype=torch.uint8) if bitmaps is None else bitmaps
        self.per_sample, self.loss_scale, self.seed, self.large = per_sample, loss_scale, seed, large
        self.decay, self.weigh, self.precision = decay, weigh, precision
        self.factors: list[Tensor] = []  # by which each local step of a cohort multiplied its gradients, (K, 1)
        self.change = torch.zeros(0)
        self.subspace, self.theta = Subspace(mask), stacked(space.read(net), cohort)
        self.graph = graph and not (compile or len(self.bitmaps) or loss_scale != 1.0 or self.objective.corrects)
        self.rows, self.optimizer, self.graphs = self._formed(mask)
        self.local, self.frozen = self._local(), self._frozen(mask)
        self.lr: float = self.optimizer.defaults["lr"]

    def _formed(self, mask: Tensor) -> tuple[Rows, MaskedOptimizer, Graphs | None]:
        """Bind the network to the rows, build the optimizer of their trained coordinates, and graphs of its steps."""
        rows, masks = self._single(mask) if self.cohort == 1 else self._several(mask)
        optimizer = self.make_optimizer(rows.views)
        optimizer.set_masks(masks)
        return rows, optimizer, Graphs() if self.graph and self.theta.device.type == "cuda" else None

    def _local(self) -> Tensor | None:
        """Mark the trained coordinates that stay with each client, bool (n,); None if there are none."""
        local = self.subspace.of(self.space.local.to(self.theta.device))
        return local if bool(local.any()) else None

    def _single(self, mask: Tensor) -> tuple[Rows, list[Tensor | None]]:
        """Build one row: whole on a GPU or of small tensors, else in blocks, each with its mask, which are stepped."""
        given, on_cpu = (self.losses, self.forward, self.weigh), self.theta.device.type == "cpu"
        if not on_cpu or max(self.space.sizes) < self.large:
            return WholeRow(self.net, self.space, self.theta, mask, *given, by_unit=not on_cpu), [mask]
        whole = Block("", 0, (self.space.size,), mask)
        split = [whole] if len(self.bitmaps) else blocks(self.space, mask, self.large)
        rows = BoundRow(self.net, self.space, self.theta, mask, split, *given)
        return rows, [block.mask for block in split]

    def _several(self, mask: Tensor) -> tuple[Rows, list[Tensor | None]]:
        """Build K rows, which the optimizer steps as one tensor with one mask."""
        given = self.losses, self.forward, self.per_sample, self.weigh
        rows = StackedRows(self.net, self.space, self.theta, mask, *given)
        return rows, [None if self.subspace.index is None else mask.expand_as(self.theta)]

    def move(self, carry: Carry) -> None:
        """Train the coordinates of another mask, between two rounds; those that stop become zero if ``carry.zeros``."""
        self.rows.release()
        row = self.space.read(self.net)  # the global row: with K > 1 ``theta`` holds the clients'
        if carry.zeros:
            self.space.write(self.net, row.masked_fill_(~carry.after.mask, 0.0))
        self.subspace, self.theta = carry.after, stacked(row, self.cohort)
        self.rows, self.optimizer, self.graphs = self._formed(carry.after.mask)
        self.local, self.frozen = self._local(), self._frozen(carry.after.mask)

    def train(self, start: Start, cohort: Cohort) -> Update:
        """Run the local steps of K clients from the values that the server sent: their update.

        ClientUpdate(k, x) of McMahan et al. 2017, algorithm 1, with a masked optimizer.
        """
        correction = self.start(start, cohort.clients)
        taken: Counts = cohort.count
        seed_dropout(self.theta.device, self.seed, cohort)
        with self.precision():
            x, y = self.fetch(cohort)
            if start.patience is not None:
                stop = Patience(taken, start.epochs, start.patience)
                losses, taken = self._patiently(x, y, stop, start.lr, correction)
            elif self.graphs is not None and len(taken) <= LONGEST and (self.cohort == 1 or even(taken)):
                losses = self._replayed(self.graphs, x, y, cohort, start, correction)
            else:
                losses = self._steps(x, y, taken, start.lr, correction)
        values = self.subspace.of(self.theta.detach())
        update = self._update(start, cohort, values, losses, taken)
        kept = correction.finish(update.rows, start.lr, update.steps)
        if self.buffers.space.size:
            kept |= self.buffers.kept(cohort.clients)
        if self.local is not None:
            kept[LOCAL] = (cohort.clients, values[:, self.local])
        variates = kept[VARIATES][1] if VARIATES in kept else None
        return replace(update, kept=kept, variates=variates) if kept else update

    def _update(self, start: Start, cohort: Cohort, values: Tensor, losses: Tensor, taken: Counts) -> Update:
        """Build the update of clients that have trained, refused where it is not finite; the host waits once.

        Args:
            start: what they started from.
            cohort: the clients.
            values: (K, n) after training.
            losses: (S * K,), step by step.
            taken: [S][K] samples of each step.

        """
        if self.change.shape != values.shape or self.change.device != values.device:
            self.change = torch.empty_like(values)  # reused: the next cohort overwrites it
        change, totals = self.change, subtract(values, start.values, self.change)
        buffers = self.buffers.change(start.group) if self.buffers.size else values.new_zeros(len(values), 0)
        clipped = [(torch.cat(self.factors) < 1).sum().view(1)] if self.factors else []
        totals = totals + buffers.sum(1) if buffers.shape[1] else totals
        of_steps, sums, *counts = read(losses, totals, *clipped)
        steps = range(0, len(of_steps), self.cohort)
        update = Update(
            cohort.clients,
            change,
            buffers,
            processed(taken) if cohort.processed and start.patience else cohort.weight,
            mean_losses([of_steps[step : step + self.cohort] for step in steps], taken),
            start=start.values,
            values=values,
            round=cohort.round,
            steps=step_weights(taken, self.optimizer),
            local_steps=sum(n > 0 for step in taken for n in step),
            clipped=int(sum(map(sum, counts))),
        )
        return finite(update, sums)

    def start(self, start: Start, clients: Sequence[int]) -> GradientCorrection:
        """Set K clients to their start, with reset optimizer state, and with their masks if these differ."""
        self.subspace.write(self.theta, start.values)
        correction = self.objective.start(self.theta, clients, self.subspace)
        if len(self.bitmaps):
            masks = unpack(self.bitmaps[torch.tensor([max(client, 0) for client in clients])], self.space.size)
            self.frozen = self._frozen(masks)
            self.optimizer.set_masks([masks if self.cohort > 1 else masks[0]])
        for group in self.optimizer.param_groups:
            group["lr"] = start.lr
        self.optimizer.reset()
        if not self.rows.intact():  # the network's gradients were cleared, as by a validation
            self.rows.bind()
        if self.buffers.space.size:
            self.buffers.start(clients, start.group)
        self.factors.clear()
        return correction

    def _steps(self, x: Tensor, y: Tensor, count: Counts, lr: float, correction: GradientCorrection) -> Tensor:
        """Take all local steps on samples (K, S, B, ...): losses (S * K,), step by step."""
        batches: Iterable[Batch] = zip(*(x[0], y[0]) if self.cohort == 1 else (x.unbind(1), y.unbind(1)), strict=True)
        if self.decay is not None:
            batches = self._paced(batches, rates(self.decay, lr, count, self.theta.device))
        steps = zip(batches, count, strict=True)
        return torch.stack([self.step(*batch, samples, correction) for batch, samples in steps]).view(-1)

    def _replayed(
        self, graphs: Graphs, x: Tensor, y: Tensor, cohort: Cohort, start: Start, correction: GradientCorrection
    ) -> Tensor:
        """Take all local steps by a graph, where that is possible: losses (S * K,), step by step."""

        def train(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return self._steps(x, y, cohort.count, start.lr, correction), *self.factors

        def hold() -> Callable[[], None]:
            counters = [(buffer, buffer.clone()) for buffer in self.net.buffers() if not buffer.is_floating_point()]

            def restart() -> None:
                self.start(start, cohort.clients)
                seed_dropout(self.theta.device, self.seed, cohort)
                for buffer, before in counters:
                    buffer.copy_(before)

            return restart

        losses, *self.factors = graphs.run(train, hold, x, y, (cohort.count, start.lr))
        return losses

    def _paced(self, batches: Iterable[Batch], rates: Sequence[float | Tensor]) -> Iterator[Batch]:
        """Set the learning rate of each local step as its batch is taken."""
        for batch, rate in zip(batches, rates, strict=True):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield batch

    def _patiently(
        self, x: Tensor, y: Tensor, stop: Patience, lr: float, correction: GradientCorrection
    ) -> tuple[Tensor, Counts]:
        """Train until each client has stopped early or taken all steps: losses, and the samples [S][K] of the steps."""
        losses = list[Tensor]()
        batches: Iterable[Batch] = zip(*(x[0], y[0]) if self.cohort == 1 else (x.unbind(1), y.unbind(1)), strict=True)
        if self.decay is not None:
            batches = self._paced(batches, rates(self.decay, lr, stop.counts, self.theta.device))
        for batch, count in zip(batches, stop.counts, strict=True):
            losses.append(
                self.step(*batch, stop.allowed(count), correction).view(-1)
            )  # one client's loss has no dimension
            stop.update(losses[-1].tolist())
        return torch.cat(losses), stop.taken

    def step(self, x: Tensor, y: Tensor, count: Sequence[int], correction: GradientCorrection) -> Tensor:
        """Take one local step of K clients: x (K, B, ...), y (K, B) -> losses (K,); K = 1 has no such dimension."""
        if not any(count):
            return self.theta.new_zeros(self.cohort)
        x = self.inputs(x)
        scaled = self.loss_scale != 1.0
        losses = self._scaled_backward(x, y, count) if scaled else self.rows.backward(x, y, count, None)
        correction.correct(self.rows)
        if self.clip_norm is not None:
            self._clip(self.clip_norm)
        self.optimizer.update() if all(count) else self._step_where(count)
        torch.clear_autocast_cache()  # one autocast around all steps may keep copies of weights that have moved now
        self.rows.clear()
        return losses

    def _scaled_backward(self, x: Tensor, y: Tensor, count: Sequence[int]) -> Tensor:
        """Compute gradients in half precision: each client's loss is scaled, and its scale halved on overflow.

        The step is repeated, not skipped, and every step starts from the same scale: so the scale is no state that
        outlives a step. A client that overflows at the smallest scale has diverged.
        """
        scale = self.theta.new_full((self.cohort,), self.loss_scale)
        while True:
            losses = self.rows.backward(x.clone(), y.clone(), count, scale)  # copies: a network may change its input
            gradients = self._gradients()
            done = torch.stack([g.isfinite().all(1) for g in gradients]).all(0) | (scale <= SMALLEST_SCALE)
            if bool(done.all()):
                for g in gradients:
                    g.div_(scale.unsqueeze(1))
                return losses
            scale = torch.where(done, scale, scale / 2)
            self.rows.clear()

    def _gradients(self) -> list[Tensor]:
        """View the gradients of the last backward as (K, *), a row for each client."""
        return [g.view(self.cohort, -1) for g in self.rows.gradients]

    def _clip(self, most: float) -> None:
        """Clip each client's gradient over its trained coordinates, as ``torch.nn.utils.clip_grad_norm_`` does.

        The factors stay on the device, and the host reads them once a cohort, so that a step does not wait for it.
        """
        if self.frozen is not None:
            for g, frozen in zip(self.rows.gradients, self.rows.parts(self.frozen), strict=True):
                g.masked_fill_(frozen, 0.0)
        gradients = self._gradients()
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients])
        factor = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0).unsqueeze(1)
        for g in gradients:
            g.mul_(factor)
        self.factors.append(factor)

    def _frozen(self, mask: Tensor) -> Tensor | None:
        """Mark the coordinates that clipping leaves out; None if there are none."""
        return None if self.clip_norm is None or bool(mask.all()) else ~mask

    def _step_where(self, count: Sequence[int]) -> None:
        """Step the clients with samples; row and state of the others are copied back, as NaN * 0 is NaN."""
        dead, states = [k for k, n in enumerate(count) if n == 0], self.optimizer.rows(self.cohort)
        before, kept = self.theta.detach()[dead], [(view, view.clone()) for k in dead for view in states[k]]
        self.optimizer.update()
        with torch.no_grad():
            self.theta[dead] = before
            for view, old in kept:
                view.copy_(old)

    def release(self) -> None:
        """Restore the backward of the network's layers, when training ends."""
        self.rows.release()


def no_samples(cohort: Cohort) -> Batch:
    """Refuse to fetch: the default where ``step`` is called with batches, and ``train`` never is.

    Raises:
        ValueError: always.

    """
    raise ValueError("these clients hold no samples")


def rates(decay: Within, lr: float, counts: Counts, device: torch.device) -> list[float | Tensor]:
    """Compute the learning rate of each local step of K clients.

    Args:
        decay: factor by local step and number of local steps.
        lr: that it multiplies.
        counts: [S][K] real samples of each step; a client with fewer steps than others has 0 in its last ones.
        device: of the rates.

    Returns:
        S: a number where it is that of all clients which take the step, else float64 (K,), 0 for those which do not.

    >>> rates(lambda s, steps: 1 - s / steps, 0.5, [[8, 8], [8, 8], [0, 3], [0, 3]], torch.device("cpu"))[1:3]
    [tensor([0.2500, 0.3750], dtype=torch.float64), 0.25]
    """
    steps = [sum(n > 0 for n in client) for client in zip(*counts, strict=True)]
    table = [
        [lr * decay(s, of) if n else 0.0 for n, of in zip(count, steps, strict=True)] for s, count in enumerate(counts)
    ]
    taken = [{rate for rate, n in zip(row, count, strict=True) if n} for row, count in zip(table, counts, strict=True)]
    return [
        of.pop() if len(of) == 1 else torch.tensor(row, dtype=torch.float64, device=device)
        for row, of in zip(table, taken, strict=True)
    ]


def processed(taken: Counts) -> tuple[float, ...]:
    """Compute the weights of K clients by processed samples: ``taken`` [S][K]."""
    return tuple(float(sum(counts)) for counts in zip(*taken, strict=True))


def check_stackable(net: nn.Module, cohort: int) -> None:
    """Refuse to stack clients that would share running statistics.

    Raises:
        ValueError: K > 1 with BatchNorm.

    """
    if cohort > 1 and not can_stack(net):
        raise ValueError("federation.cohort above 1 cannot stack BatchNorm; use federation.cohort=1 or GroupNorm")


def can_stack(net: nn.Module) -> bool:
    """Whether several clients can share a forward: not with BatchNorm, whose running statistics are one client's."""
    return not any(isinstance(module, _BatchNorm) for module in net.modules())


def stacked(row: Tensor, clients: int) -> Tensor:
    """Build the rows (K, P) of K clients, all equal to one row, with gradients of zeros."""
    theta = row.repeat(clients, 1)
    theta.grad = zeros(theta)
    return theta


def zeros(like: Tensor) -> Tensor:
    """Build zeros; on a CPU by numpy, which takes memory only at the first write: frozen tensors never need any."""
    if like.device.type != "cpu":
        return torch.zeros_like(like)
    return torch.from_numpy(np.zeros(like.shape, like.numpy().dtype))


def even(counts: Counts) -> bool:
    """Whether all clients take all steps [S][K] on as many samples, by weights that stay on the device."""
    return len({samples for step in counts for samples in step}) == 1


def mean_losses(losses: Sequence[Sequence[float]], count: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Compute each client's mean loss over its samples: losses [S][K], real samples [S][K] -> K numbers.

    >>> mean_losses([[1.0, 2.0], [4.0, 0.0]], [[2, 2], [1, 0]])
    (2.0, 2.0)
    """
    rows = zip(zip(*losses, strict=True), zip(*count, strict=True), strict=True)
    return tuple(sum(v * n for v, n in zip(*row, strict=True)) / max(1, sum(row[1])) for row in rows)


def seed_dropout(device: torch.device, seed: int, cohort: Cohort) -> None:
    """Seed the device that trains, by the run's seed, the round and the first client.

    ``torch.manual_seed`` would seed all devices, and takes half a millisecond.
    """
    if cohort.clients[0] >= 0:
        drawn = number(seed, Purpose.DROPOUT, cohort.round, cohort.clients[0])
        torch.default_generator.manual_seed(drawn)
        if device.type == "cuda":
            torch.cuda.manual_seed(drawn)
