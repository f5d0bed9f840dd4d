"""The clients of a cohort as a LightningModule: the network, the loss, and the hooks around ``Clients``.

Shapes: K clients of the cohort, P coordinates, B samples of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from fedsparse.core.precisions import HALF
from fedsparse.core.space import ParamSpace
from fedsparse.core.targets import Weigh, count, cross_entropy, hits
from fedsparse.core.transfer import on_device
from fedsparse.data.images import unchanged
from fedsparse.data.rounds import Bundle, Cohort
from fedsparse.federation.client.bound import Forward
from fedsparse.federation.client.buffers import BUFFERS, Buffers
from fedsparse.federation.client.drift import DriftCorrection, NoCorrection
from fedsparse.federation.client.training import (
    LOSS_SCALE,
    Batch,
    Clients,
    MakeClientOptimizer,
    Precision,
    check_stackable,
    no_samples,
)
from fedsparse.federation.round import Round, TakePart, take_part
from fedsparse.federation.schedule import Within
from fedsparse.federation.stores.store import ClientStore
from fedsparse.federation.watcher import Watcher
from fedsparse.masks.bitmaps import unpack
from fedsparse.optim.index import LARGE


def _given(logits: Tensor, x: Tensor) -> Tensor:
    """Return given logits in place of a forward, so that ``losses`` does not compute them again."""
    return logits


def only_one(group: int) -> None:
    """Do nothing: the network has the weights of the one global model."""


class ClientModule(lightning.LightningModule):
    """The clients' network, loss and optimizer. For another loss, subclass and override ``losses``.

    Args:
        net: the network; between rounds it has the weights of the global model.
        space: which of its tensors are federated.
        mask: bool (P,), True where a coordinate trains.
        make_optimizer: builds the clients' optimizer of a list of tensors.
        cohort: K, clients that train together.
        clip_norm: largest L2 norm of a client's gradient over its trained coordinates, or None.
        inputs: transforms images of any leading dimensions into the network's inputs, on their device.
        compile: whether torch compiles the network for the local steps.
        objective: the drift correction; none by default.
        buffers: policy of float buffers; see ``Buffers``.
        weigh: weights of the samples in a batch's mean loss, from their targets; None: all are equal.
        seed: the run's seed, for dropout.
        large: coordinates from which a tensor is a block of its own (K = 1, on a CPU).
        graph: whether a CUDA graph replays the local steps, where that is possible.
        decay: factor of the learning rate by local step and number of local steps; None: 1.

    Attributes:
        clients: exists once Lightning has moved the network to its device.

    Raises:
        ValueError: K > 1 with BatchNorm, whose running statistics cannot be stacked.

    """

    clients: Clients

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        mask: Tensor,
        make_optimizer: MakeClientOptimizer,
        cohort: int = 1,
        clip_norm: float | None = None,
        inputs: Callable[[Tensor], Tensor] = unchanged,
        compile: bool = False,
        objective: DriftCorrection | None = None,
        buffers: str = "average",
        weigh: Weigh | None = None,
        seed: int = 0,
        large: int = LARGE,
        graph: bool = False,
        decay: Within | None = None,
    ) -> None:
        super().__init__()
        check_stackable(net, cohort)
        self.automatic_optimization = False
        self.net, self.space, self.cohort, self.clip_norm = net, space, cohort, clip_norm
        self.make_optimizer, self.inputs, self.compile_net = make_optimizer, inputs, compile
        self.objective = NoCorrection() if objective is None else objective
        self.buffer_policy, self.groups, self.seed, self.large = buffers, 1, seed, large
        self.weigh = weigh
        self.graph = graph
        self.decay = decay
        self.buffer_store: ClientStore | None = None
        self.round: Round | None = None
        self.take_part: TakePart = take_part
        self.show: Callable[[int], None] = only_one
        self.register_buffer("mask", mask.clone())
        self.register_buffer("bitmaps", torch.zeros(0, 0, dtype=torch.uint8))

    def set_mask(self, mask: Tensor, bitmaps: Tensor | None = None) -> None:
        """Set the mask of checkpoints, and of clients that are built later.

        Args:
            mask: bool (P,), True where some client trains.
            bitmaps: uint8 (N, ceil(P / 8)), the masks of N clients; empty if all train ``mask``, None to keep them.

        """
        torch.as_tensor(self.mask).copy_(mask)
        if bitmaps is not None:
            self.bitmaps = bitmaps

    def stack(self, cohort: int) -> None:
        """Set the cohort size K of clients that are built later."""
        check_stackable(self.net, cohort)
        self.cohort = cohort

    def own_masks(self, clients: Sequence[int]) -> Tensor | None:
        """Unpack the masks of K clients, bool (K, P); None if all train the same coordinates."""
        if not len(bitmaps := torch.as_tensor(self.bitmaps)):
            return None
        chosen = on_device(torch.tensor([max(client, 0) for client in clients]), bitmaps.device)
        return unpack(bitmaps[chosen], self.space.size)

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Set the stores of buffers and of the drift correction, which ``make`` builds by name."""
        self.buffer_store = make(BUFFERS)
        self.objective.keep_in(make)

    def losses(self, forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        """Compute the loss of every sample of one client's batch: (B, ...), (B,) -> (B,).

        Args:
            forward: the client's network; ``forward(x)`` returns logits (B, classes), or (B, L, classes) of sequences.
            x: inputs.
            y: labels (B,), or sequences of targets (B, L), of which a sample's loss is the mean.

        """
        return cross_entropy(forward(x), y)

    def form(
        self, fetch: Callable[[Cohort], Batch] = no_samples, loss_scale: float = 1.0, precision: Precision = nullcontext
    ) -> Clients:
        """Build the clients, on the network's present device.

        Args:
            fetch: gathers their samples.
            loss_scale: factor of the loss in half precision.
            precision: context of the local training.

        """
        return Clients(
            self.net,
            self.space,
            torch.as_tensor(self.mask).clone(),
            self.make_optimizer,
            self.losses,
            fetch,
            cohort=self.cohort,
            clip_norm=self.clip_norm,
            inputs=self.inputs,
            compile=self.compile_net,
            objective=self.objective,
            buffers=Buffers(self.net, self.buffer_policy, self.buffer_store),
            bitmaps=torch.as_tensor(self.bitmaps),
            per_sample=type(self).losses is ClientModule.losses,
            loss_scale=loss_scale,
            precision=precision,
            weigh=self.weigh,
            seed=self.seed,
            large=self.large,
            graph=self.graph,
            decay=self.decay,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the clients with their optimizer, and return an optimizer of an empty tensor.

        Lightning counts the latter's steps, one a round, and writes no checkpoint while that count stays the same.
        """
        scale = LOSS_SCALE if self.trainer.precision == HALF else 1.0
        self.clients = self.form(self._fetch, scale, self.trainer.precision_plugin.train_step_context)
        return torch.optim.SGD([torch.zeros(0, requires_grad=True)], lr=0.0)

    def _fetch(self, cohort: Cohort) -> Batch:
        """Gather a cohort's samples from the data module."""
        x, y = self.trainer.datamodule.fetch(cohort)  # type: ignore[attr-defined]
        return x, y

    def evaluate(self, groups: int, show: Callable[[int], None]) -> None:
        """Set the number of global models to evaluate; ``show`` loads one of them, by index, into the network."""
        self.groups = groups
        self.show = show if groups > 1 else only_one

    def join(self, round: Round, take_part: TakePart = take_part) -> None:
        """Take part in a round, which has opened; ``take_part`` trains its cohorts."""
        self.round, self.take_part = round, take_part

    def watch(self, watcher: Watcher) -> None:
        """Let a watcher observe the open round."""
        assert self.round is not None
        self.round.watch(watcher)

    def training_step(self, bundle: Bundle, batch_idx: int) -> None:
        """Train the cohorts of a bundle in the open round; only their local steps are autocast."""
        assert self.round is not None  # set by ``FederatedRounds.on_train_epoch_start``
        with torch.autocast(self.device.type, enabled=False):
            self.take_part(self.round, self.clients, bundle.cohorts)
        if self.trainer.is_last_batch:
            self.optimizers().step()  # type: ignore[union-attr]
            self.round = None  # frees its sums when it closes

    def on_train_end(self) -> None:
        """Restore the backward of the network's layers."""
        self.clients.release()

    def on_validation_model_zero_grad(self) -> None:
        """Do nothing: gradients are views into the row, and Lightning's None would unbind them."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate the G global models on a batch; logits are not kept, which of sequences would fill the memory.

        Returns:
            ``correct``, bool (B, G), and ``losses`` (B, G); of sequences also ``targets`` and ``weights``, as
            ``scores`` has them.

        """
        found = []
        for group in range(self.groups):
            self.show(group)
            found.append(self.scores(self.net(self.inputs(batch[0])), *batch))
        self.show(0)
        of_groups = {key: torch.stack([scores[key] for scores in found], 1) for key in ("correct", "losses")}
        return {**found[0], **of_groups}

    def scores(self, logits: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Evaluate given logits of a batch.

        Args:
            logits: (B, classes), or (B, L, classes).
            x: inputs.
            y: labels (B,), or sequences of targets (B, L).

        Returns:
            ``correct``, bool (B,), and ``losses`` (B,). Of sequences also ``targets``, how many each has, int64 (B,),
            and ``weights`` (B,) in a mean of the losses.

        """
        scores = {"correct": hits(logits, y), "losses": self.losses(partial(_given, logits), x, y)}
        if y.ndim == 1:
            return scores
        targets = count(y)
        return scores | {
            "targets": targets,
            "weights": torch.ones_like(targets) if self.weigh is None else self.weigh(y),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store K, which may have been measured."""
        checkpoint["cohort"] = self.cohort


# Lightning inspects this signature for every batch; a stored one saves that time
setattr(ClientModule.training_step, "__signature__", inspect.signature(ClientModule.training_step))  # noqa: B010
