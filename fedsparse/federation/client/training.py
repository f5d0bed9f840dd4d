"""Local training of K clients, the rows of one tensor; without Trainer, data module and server.

Shapes: K clients of the cohort, P coordinates of which n train, S local steps, B samples of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsparse.core.seeding import Purpose, number
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Carry, Subspace
from fedsparse.core.targets import Weigh
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
from fedsparse.federation.client.stacked import StackedRows
from fedsparse.federation.exchange.update import Start, Update, finite
from fedsparse.masks.bitmaps import unpack
from fedsparse.optim.index import LARGE, Block, blocks
from fedsparse.optim.masked import MaskedOptimizer

LOCAL = "clients"  # the store of local coordinates
LOSS_SCALE, SMALLEST_SCALE = 1024.0, 2.0**-8

Batch = tuple[Tensor, Tensor]
MakeClientOptimizer = Callable[[list[Tensor]], MaskedOptimizer]


class Clients:
    """Trains the clients of a cohort of K.

    With K = 1 the network's parameters are views into the row, so that any module trains without a copy (``BoundRow``).
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
        weigh: weights of the samples in a batch's mean loss, from their targets; None: all are equal.
        seed: the run's seed, for dropout.
        large: coordinates from which a tensor is a block of its own (K = 1).

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
        weigh: Weigh | None = None,
        seed: int = 0,
        large: int = LARGE,
    ) -> None:
        check_stackable(net, cohort)
        self.net, self.space, self.cohort, self.clip_norm = net, space, cohort, clip_norm
        self.make_optimizer, self.losses, self.fetch, self.inputs = make_optimizer, losses, fetch, inputs
        self.forward: Forward = torch.compile(net, dynamic=False) if compile else net  # evaluation calls the net itself
        self.objective = NoCorrection() if objective is None else objective
        self.buffers = Buffers(net) if buffers is None else buffers
        self.bitmaps = torch.zeros(0, 0, dtype=torch.uint8) if bitmaps is None else bitmaps
        self.per_sample, self.loss_scale, self.seed, self.large = per_sample, loss_scale, seed, large
        self.weigh = weigh
        self.factors: list[Tensor] = []  # by which each local step of a cohort multiplied its gradients, (K, 1)
        self.change = torch.zeros(0)
        self.subspace, self.theta = Subspace(mask), stacked(space.read(net), cohort)
        self.rows, self.optimizer = self._formed(mask)
        self.local, self.frozen = self._local(), self._frozen(mask)
        self.lr: float = self.optimizer.defaults["lr"]

    def _formed(self, mask: Tensor) -> tuple[Rows, MaskedOptimizer]:
        """Bind the network to the rows, and build the optimizer of their trained coordinates."""
        rows, masks = self._single(mask) if self.cohort == 1 else self._several(mask)
        optimizer = self.make_optimizer(rows.views)
        optimizer.set_masks(masks)
        return rows, optimizer

    def _local(self) -> Tensor | None:
        """Mark the trained coordinates that stay with each client, bool (n,); None if there are none."""
        local = self.subspace.of(self.space.local.to(self.theta.device))
        return local if bool(local.any()) else None

    def _single(self, mask: Tensor) -> tuple[Rows, list[Tensor | None]]:
        """Build one row in blocks, each with its mask, as the optimizer steps them."""
        whole = Block("", 0, (self.space.size,), mask)
        split = [whole] if len(self.bitmaps) else blocks(self.space, mask, self.large)
        rows = BoundRow(self.net, self.space, self.theta, mask, split, self.losses, self.forward, self.weigh)
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
        self.rows, self.optimizer = self._formed(carry.after.mask)
        self.local, self.frozen = self._local(), self._frozen(carry.after.mask)

    def train(self, start: Start, cohort: Cohort) -> Update:
        """Run the local steps of K clients from the values that the server sent: their update.

        ClientUpdate(k, x) of McMahan et al. 2017, algorithm 1, with a masked optimizer.
        """
        correction = self.start(start, cohort.clients)
        taken: Counts = cohort.count
        if cohort.clients[0] >= 0:
            seed_dropout(self.theta.device, number(self.seed, Purpose.DROPOUT, cohort.round, cohort.clients[0]))
        x, y = self.fetch(cohort)
        batches = zip(x[0], y[0]) if self.cohort == 1 else zip(x.unbind(1), y.unbind(1))  # noqa: B905
        if start.patience is None:
            losses = [self.step(*batch, count, correction) for batch, count in zip(batches, taken, strict=True)]
        else:
            losses, taken = self._patiently(batches, Patience(taken, start.epochs, start.patience), correction)
        values = self.subspace.of(self.theta.detach())
        if self.change.shape != values.shape or self.change.device != values.device:
            self.change = torch.empty_like(values)  # reused: the next cohort overwrites it
        update = finite(
            Update(
                cohort.clients,
                torch.sub(values, start.values, out=self.change),
                self.buffers.change(start.group) if self.buffers.size else values.new_zeros(len(values), 0),
                processed(taken) if cohort.processed and start.patience else cohort.weight,
                mean_losses(torch.stack(losses).view(-1, self.cohort).tolist(), taken),
                start=start.values,
                values=values,
                round=cohort.round,
                steps=step_weights(taken, self.optimizer),
                local_steps=sum(n > 0 for step in taken for n in step),
                clipped=int((torch.cat(self.factors) < 1).sum()) if self.factors else 0,
            )
        )
        kept = correction.finish(update.rows, start.lr, update.steps)
        if self.buffers.space.size:
            kept |= self.buffers.kept(cohort.clients)
        if self.local is not None:
            kept[LOCAL] = (cohort.clients, values[:, self.local])
        variates = kept[VARIATES][1] if VARIATES in kept else None
        return replace(update, kept=kept, variates=variates) if kept else update

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

    def _patiently(
        self, batches: Iterable[Batch], stop: Patience, correction: GradientCorrection
    ) -> tuple[list[Tensor], Counts]:
        """Train until each client has stopped early or taken all steps: losses, and the samples [S][K] of the steps."""
        losses = list[Tensor]()
        for batch, count in zip(batches, stop.counts, strict=True):
            losses.append(
                self.step(*batch, stop.allowed(count), correction).view(-1)
            )  # one client's loss has no dimension
            stop.update(losses[-1].tolist())
        return losses, stop.taken

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

    def show(self, row: Tensor) -> None:
        """Load a row (P,) into the network, for evaluation and checkpoints."""
        self.space.write(self.net, row)

    def release(self) -> None:
        """Restore the backward of the network's layers, when training ends."""
        self.rows.release()


def no_samples(cohort: Cohort) -> Batch:
    """Refuse to fetch: the default where ``step`` is called with batches, and ``train`` never is.

    Raises:
        ValueError: always.

    """
    raise ValueError("these clients hold no samples")


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


def mean_losses(losses: Sequence[Sequence[float]], count: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Compute each client's mean loss over its samples: losses [S][K], real samples [S][K] -> K numbers.

    >>> mean_losses([[1.0, 2.0], [4.0, 0.0]], [[2, 2], [1, 0]])
    (2.0, 2.0)
    """
    rows = zip(zip(*losses, strict=True), zip(*count, strict=True), strict=True)
    return tuple(sum(v * n for v, n in zip(*row, strict=True)) / max(1, sum(row[1])) for row in rows)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the device that trains; ``torch.manual_seed`` would seed all devices, and takes half a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
