"""K clients as rows of one tensor, and the whole of their local training.

Shapes: K clients of the cohort, P coordinates of which n train, S local steps, B samples of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedsparse.core.precisions import HALF
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Coordinates
from fedsparse.data.images import unchanged
from fedsparse.data.rounds import Cohort
from fedsparse.federation.client.bound import BoundRow
from fedsparse.federation.client.drift import Objective, Plain, Rows, step_weights
from fedsparse.federation.client.early_stopping import Counts, Patience
from fedsparse.federation.client.stacked import StackedRows
from fedsparse.federation.server.server import MakeOptimizer, Server
from fedsparse.masks.bitmaps import unpack
from fedsparse.optim.index import Piece, pieces
from fedsparse.optim.masked import MaskedOptimizer

Forward = Callable[[Tensor], Tensor]
LOSS_SCALE, SMALLEST_SCALE = 1024.0, 2.0**-8


class ClientModule(lightning.LightningModule):
    """The clients of a cohort: their losses, their local training, and the optimizers of clients and server.

    With K = 1 the network's parameters are views into the row, so that any module trains without a copy (``BoundRow``).
    With K > 1 the rows train together (``StackedRows``). To change what is learned, subclass and override ``losses``.

    Args:
        net: the network; between rounds it holds the global model.
        space: which of its tensors are federated.
        mask: bool (P,), True where a coordinate trains.
        make_optimizer: builds the clients' optimizer of a list of one tensor (K, P).
        make_server_optimizer: builds the server's optimizer of a list of one tensor (1, P).
        cohort: K, clients that train together.
        clip_norm: largest L2 norm of a client's gradient over its trained coordinates, or None.
        inputs: turns images of any leading dimensions into what the network takes, on their device.
        compile: let torch compile the network for the local steps.
        objective: adds to the clients' gradients.
        untouched: what becomes of a coordinate that nobody sent; see ``Server``.

    Raises:
        ValueError: K > 1 with BatchNorm, whose running statistics cannot be stacked.

    """

    rows: Rows

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        mask: Tensor,
        make_optimizer: Callable[[list[Tensor]], MaskedOptimizer],
        make_server_optimizer: MakeOptimizer,
        cohort: int = 1,
        clip_norm: float | None = None,
        inputs: Callable[[Tensor], Tensor] = unchanged,
        compile: bool = False,
        objective: Objective | None = None,
        untouched: str = "hold",
    ) -> None:
        super().__init__()
        if cohort > 1 and not can_stack(net):
            raise ValueError("federation.cohort above 1 cannot stack BatchNorm; use federation.cohort=1 or GroupNorm")
        self.automatic_optimization = False
        self.net, self.space, self.cohort, self.clip_norm = net, space, cohort, clip_norm
        self.make_optimizer, self.make_server_optimizer = make_optimizer, make_server_optimizer
        self.inputs, self.compile_net = inputs, compile
        self.objective, self.untouched = Plain() if objective is None else objective, untouched
        self.register_buffer("mask", mask.clone())
        self.register_buffer("bitmaps", torch.zeros(0, 0, dtype=torch.uint8))
        self.loss_scale = 1.0
        self.mean_loss: tuple[float, ...] = ()
        self.patience: int | None = None  # of the phase, as is what follows
        self.epochs, self.explores = 1, False
        self.steps = 0
        self.clipped = 0
        self.factors: list[Tensor] = []  # by which each local step of a cohort multiplied its gradients, (K, 1)
        self.taken: Counts = ()

    def set_mask(self, mask: Tensor, bitmaps: Tensor | None = None) -> None:
        """Choose the coordinates that train, before training starts.

        Args:
            mask: bool (P,), what some client trains.
            bitmaps: uint8 (N, ceil(P / 8)), the own mask of each of N clients; None or empty if all train ``mask``.

        """
        torch.as_tensor(self.mask).copy_(mask)
        if bitmaps is not None:
            self.bitmaps = bitmaps

    def own_masks(self, clients: Sequence[int]) -> Tensor | None:
        """Own masks of K clients, bool (K, P); None if all train the same coordinates."""
        bitmaps = torch.as_tensor(self.bitmaps)
        if not len(bitmaps):
            return None
        return unpack(bitmaps[torch.tensor([max(client, 0) for client in clients])], self.space.size)

    def losses(self, forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        """Loss of every sample of one client's batch: (B, ...), (B,) -> (B,).

        Args:
            forward: the client's network; ``forward(x)`` returns logits (B, classes).
            x: inputs.
            y: labels.

        """
        return F.cross_entropy(forward(x), y, reduction="none")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Make the clients' rows and optimizer, and the server with its own; Lightning stores the latter."""
        row = self.space.read(self.net)
        self._make_rows(row)
        self.server = Server(row.unsqueeze(0), self.make_server_optimizer, self.trained, self.untouched)
        return [self.local, self.server.optimizer]

    def _make_rows(self, row: Tensor) -> None:
        """Make K rows of these values (P,), and the optimizer of what trains of them."""
        mask = torch.as_tensor(self.mask)
        self.theta = row.repeat(self.cohort, 1)
        self.theta.grad = zeros(self.theta)
        self.trained = Coordinates(mask)
        self._set_frozen(mask)
        self.rows, masks = self._single(mask) if self.cohort == 1 else self._several(mask)
        self.local = self.make_optimizer(self.rows.views)
        self.local.set_masks(masks)

    def remask(self, mask: Tensor, prune: bool = False) -> None:
        """Let other coordinates train, between two rounds: bool (P,); with ``prune`` the others become zero."""
        self.rows.release()
        self.set_mask(mask)
        if prune:
            self.server.rows.masked_fill_(~mask, 0.0)
            self.space.write(self.net, self.server.rows[0])  # of several clients' rows none is the network's
        self._make_rows(self.server.rows[0])
        self.server.follow(self.trained)
        self.rows.bind()

    def _single(self, mask: Tensor) -> tuple[Rows, list[Tensor | None]]:
        """One row, in the pieces that the optimizer steps, with the mask of each."""
        own = len(torch.as_tensor(self.bitmaps)) > 0
        split = [Piece("", 0, (self.space.size,), mask)] if own else pieces(self.space, mask)
        rows = BoundRow(self.net, self.space, self.theta, mask, split, self.losses, self._forward())
        return rows, [piece.mask for piece in split]

    def _several(self, mask: Tensor) -> tuple[Rows, list[Tensor | None]]:
        """K rows, stepped as one tensor with the mask of all; joined batches only for a loss that is known."""
        known = type(self).losses is ClientModule.losses
        rows = StackedRows(self.net, self.space, self.theta, mask, self.losses, self._forward(), known)
        return rows, [None if self.trained.index is None else mask.expand_as(self.theta)]

    def _forward(self) -> Forward:
        """The network as local steps call it; evaluation calls it as it is, and compiles nothing."""
        return torch.compile(self.net, dynamic=False) if self.compile_net else self.net

    def on_train_start(self) -> None:
        """Bind the network to its row."""
        self.loss_scale = LOSS_SCALE if self.trainer.precision == HALF else 1.0
        self.rows.bind()

    def on_train_end(self) -> None:
        """Give the network's layers back their own backward."""
        self.rows.release()

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients: they are views into the row, and None would unbind them."""

    def start(self, values: Tensor, masks: Tensor | None = None, clients: Sequence[int] = ()) -> None:
        """Let the K clients start from these trained values (K, n), with fresh optimizers, and masks of their own."""
        self.trained.write(self.theta, values)
        self.objective.start(self.theta, clients, self.trained)
        if masks is not None:
            self._set_frozen(masks)
            self.local.set_masks([masks if self.cohort > 1 else masks[0]])
        self.local.reset()
        if not self.rows.intact():
            self.rows.bind()

    def training_step(self, cohort: Cohort, batch_idx: int) -> None:
        """Run the whole local training of the cohort; leaves the rows in ``theta`` and the losses in ``mean_loss``."""
        x, y = self.trainer.datamodule.fetch(cohort)  # type: ignore[attr-defined]
        batches = zip(x[0], y[0]) if self.cohort == 1 else zip(x.unbind(1), y.unbind(1))  # noqa: B905
        counts: Counts = cohort.count
        self.factors.clear()
        if self.patience is None:
            losses = [self.local_step(*batch, count) for batch, count in zip(batches, counts, strict=True)]
        else:
            losses, counts = self._patiently(batches, counts, self.patience)
        self.mean_loss = mean_losses(torch.stack(losses).view(-1, self.cohort).tolist(), counts)
        self.taken, self.steps = counts, sum(n > 0 for step in counts for n in step)
        self.clipped = self._count_clipped()
        if self.trainer.is_last_batch:  # a step without gradients: it moves Lightning's global_step by one a round
            self.optimizers()[1].step()  # type: ignore[index]

    def _patiently(
        self, batches: Iterable[tuple[Tensor, Tensor]], counts: Counts, patience: int
    ) -> tuple[list[Tensor], Counts]:
        """Train until a client's loss has not improved for so many epochs: losses, and the samples of steps taken."""
        stop = Patience(counts, self.epochs, patience)
        losses = []
        for batch, count in zip(batches, counts, strict=True):
            losses.append(self.local_step(*batch, stop.allowed(count)).view(-1))  # one client's loss has no dimension
            stop.hear(losses[-1].tolist())
        return losses, stop.taken

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate the global model on a batch: logits (B, classes), labels (B,) and losses (B,)."""
        x, y = batch
        logits = self.net(self.inputs(x))
        return {"logits": logits, "y": y, "losses": self.losses(lambda _: logits, x, y)}

    def local_step(self, x: Tensor, y: Tensor, count: Sequence[int]) -> Tensor:
        """One step of all K clients, x (K, B, ...) and y (K, B), or of one client without K: the losses (K,) or ()."""
        if not any(count):
            return self.theta.new_zeros(self.cohort)
        x = self.inputs(x)
        scaled = self.loss_scale != 1.0
        losses = self._scaled_backward(x, y, count) if scaled else self.rows.backward(x, y, count, None)
        self.objective.correct(self.rows)
        self._clip()
        self._step_where(count)
        torch.clear_autocast_cache()  # one autocast around all steps may keep copies of weights that have moved now
        self.rows.clear()
        return losses

    def _scaled_backward(self, x: Tensor, y: Tensor, count: Sequence[int]) -> Tensor:
        """Gradients in half precision: each client's loss is scaled up, and its scale halved while they overflow.

        The step is done again, not skipped, and every step starts from the same scale: so the scale is no state that a
        resume or another cohort size would have to know. Who overflows at the smallest scale too has diverged.
        """
        scale = self.theta.new_full((self.cohort,), self.loss_scale)
        while True:
            losses = self.rows.backward(x.clone(), y.clone(), count, scale)  # which a network may write to
            gradients = self._gradients()
            done = torch.stack([g.isfinite().all(1) for g in gradients]).all(0) | (scale <= SMALLEST_SCALE)
            if bool(done.all()):
                for g in gradients:
                    g.div_(scale.unsqueeze(1))
                return losses
            scale = torch.where(done, scale, scale / 2)
            self.rows.clear()

    def _gradients(self) -> list[Tensor]:
        """Gradients of the last backward, each with a row for a client."""
        return [g.view(self.cohort, -1) for g in self.rows.gradients]

    def _clip(self) -> None:
        """Clip each client's gradient over its trained coordinates, as ``torch.nn.utils.clip_grad_norm_`` does."""
        if self.clip_norm is None:
            return
        if self.frozen is not None:
            for g, frozen in zip(self.rows.gradients, self.rows.parts(self.frozen), strict=True):
                g.masked_fill_(frozen, 0.0)
        gradients = self._gradients()
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients])
        factor = (self.clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0).unsqueeze(1)
        for g in gradients:
            g.mul_(factor)
        self.factors.append(factor)

    def _count_clipped(self) -> int:
        """Count the local steps whose gradient was clipped, once a cohort: a step itself waits for no number."""
        return int((torch.cat(self.factors) < 1).sum()) if self.factors else 0

    def step_weights(self, count: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """Sum the step weights of K clients: ``count`` [S][K] real samples of each step."""
        return step_weights(count, self.local)

    def _set_frozen(self, mask: Tensor) -> None:
        """Mark what clipping leaves out, if there is any clipping."""
        self.frozen = None if self.clip_norm is None or bool(mask.all()) else ~mask

    def _step_where(self, count: Sequence[int]) -> None:
        """Step the clients that have samples; the others keep row and state, by selection: NaN * 0 is NaN."""
        if all(count):
            self.local.update()
            return
        dead, states = [k for k, n in enumerate(count) if n == 0], self.local.rows(self.cohort)
        before, kept = self.theta.detach()[dead], [(view, view.clone()) for k in dead for view in states[k]]
        self.local.update()
        with torch.no_grad():
            self.theta[dead] = before
            for view, old in kept:
                view.copy_(old)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the clients' momentum out: it does not outlive the round. Keep K, which may have been measured."""
        checkpoint["optimizer_states"][0]["state"] = {}
        checkpoint["cohort"] = self.cohort


def can_stack(net: nn.Module) -> bool:
    """Whether several clients can share a forward: not with BatchNorm, whose running statistics are one client's."""
    return not any(isinstance(module, _BatchNorm) for module in net.modules())


def zeros(like: Tensor) -> Tensor:
    """Make zeros; on a CPU numpy's, whose memory is taken when it is first written: frozen tensors' never is."""
    if like.device.type != "cpu":
        return torch.zeros_like(like)
    return torch.from_numpy(np.zeros(like.shape, like.numpy().dtype))


def mean_losses(losses: Sequence[Sequence[float]], count: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Mean loss of each client over its samples: losses [S][K] of the steps, real samples [S][K] -> K numbers.

    >>> mean_losses([[1.0, 2.0], [4.0, 0.0]], [[2, 2], [1, 0]])
    (2.0, 2.0)
    """
    rows = zip(zip(*losses, strict=True), zip(*count, strict=True), strict=True)
    return tuple(sum(v * n for v, n in zip(*row, strict=True)) / max(1, sum(row[1])) for row in rows)


# Lightning asks for this signature at every batch; a stored one is found at once
setattr(ClientModule.training_step, "__signature__", inspect.signature(ClientModule.training_step))  # noqa: B010
