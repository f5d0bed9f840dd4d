"""The clients of a cohort as a LightningModule: the network, the loss, and the hooks around ``Clients``.

Shapes: K clients of the cohort, P coordinates, B samples of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.core.precisions import HALF
from fedsparse.core.space import ParamSpace
from fedsparse.data.images import unchanged
from fedsparse.data.rounds import Cohort
from fedsparse.federation.client.bound import Forward
from fedsparse.federation.client.buffers import BUFFERS, Buffers
from fedsparse.federation.client.drift import Objective, Plain
from fedsparse.federation.client.training import (
    LOSS_SCALE,
    Batch,
    Clients,
    MakeClientOptimizer,
    check_stackable,
    no_samples,
)
from fedsparse.federation.exchange.update import Start
from fedsparse.federation.stores.store import ClientStore
from fedsparse.masks.bitmaps import unpack
from fedsparse.optim.index import LARGE


def _given(logits: Tensor, x: Tensor) -> Tensor:
    """Return logits that are known already, in the place of a forward."""
    return logits


def only_one(group: int) -> None:
    """Show the one global model, which the network holds."""


class ClientModule(lightning.LightningModule):
    """What a client learns with. To change what is learned, subclass and override ``losses``.

    Args:
        net: the network; between rounds it holds the global model.
        space: which of its tensors are federated.
        mask: bool (P,), True where a coordinate trains.
        make_optimizer: builds the clients' optimizer of a list of tensors.
        cohort: K, clients that train together.
        clip_norm: largest L2 norm of a client's gradient over its trained coordinates, or None.
        inputs: turns images of any leading dimensions into what the network takes, on their device.
        compile: let torch compile the network for the local steps.
        objective: adds to the clients' gradients.
        buffers: what becomes of float buffers; see ``Buffers``.
        seed: the run's seed, for dropout.
        large: coordinates from which a tensor of one client is stepped by itself.

    Attributes:
        clients: the rows and their training, from the moment when Lightning has put the network on its device.

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
        objective: Objective | None = None,
        buffers: str = "average",
        seed: int = 0,
        large: int = LARGE,
    ) -> None:
        super().__init__()
        check_stackable(net, cohort)
        self.automatic_optimization = False
        self.net, self.space, self.cohort, self.clip_norm = net, space, cohort, clip_norm
        self.make_optimizer, self.inputs, self.compile_net = make_optimizer, inputs, compile
        self.objective = Plain() if objective is None else objective
        self.buffer_policy, self.groups, self.seed, self.large = buffers, 1, seed, large
        self.buffer_store: ClientStore | None = None
        self.received: Start | None = None
        self.show: Callable[[int], None] = only_one
        self.register_buffer("mask", mask.clone())
        self.register_buffer("bitmaps", torch.zeros(0, 0, dtype=torch.uint8))

    def set_mask(self, mask: Tensor, bitmaps: Tensor | None = None) -> None:
        """Choose the coordinates that train, for the clients to come and for checkpoints.

        Args:
            mask: bool (P,), what some client trains.
            bitmaps: uint8 (N, ceil(P / 8)), the own mask of each of N clients; None or empty if all train ``mask``.

        """
        torch.as_tensor(self.mask).copy_(mask)
        if bitmaps is not None:
            self.bitmaps = bitmaps

    def stack(self, cohort: int) -> None:
        """Let so many clients train together, from when they are formed."""
        check_stackable(self.net, cohort)
        self.cohort = cohort

    def own_masks(self, clients: Sequence[int]) -> Tensor | None:
        """Own masks of K clients, bool (K, P); None if all train the same coordinates."""
        if not len(bitmaps := torch.as_tensor(self.bitmaps)):
            return None
        return unpack(bitmaps[torch.tensor([max(client, 0) for client in clients])], self.space.size)

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Let the clients keep what they keep between rounds in stores made by name."""
        self.buffer_store = make(BUFFERS)
        self.objective.keep_in(make)

    def losses(self, forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        """Loss of every sample of one client's batch: (B, ...), (B,) -> (B,).

        Args:
            forward: the client's network; ``forward(x)`` returns logits (B, classes).
            x: inputs.
            y: labels.

        """
        return F.cross_entropy(forward(x), y, reduction="none")

    def form(self, fetch: Callable[[Cohort], Batch] = no_samples, loss_scale: float = 1.0) -> Clients:
        """Form the clients, with the network where it lies; ``fetch`` gives them their samples."""
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
            seed=self.seed,
            large=self.large,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Form the clients, whose optimizer is their own; Lightning counts the rounds by steps of another, of nothing.

        While its count of steps does not move it writes no checkpoint.
        """
        self.clients = self.form(self._fetch, LOSS_SCALE if self.trainer.precision == HALF else 1.0)
        return torch.optim.SGD([torch.zeros(0, requires_grad=True)], lr=0.0)

    def _fetch(self, cohort: Cohort) -> Batch:
        """Take a cohort's samples of the data module."""
        x, y = self.trainer.datamodule.fetch(cohort)  # type: ignore[attr-defined]
        return x, y

    def evaluate(self, groups: int, show: Callable[[int], None]) -> None:
        """Evaluate so many global models, of which ``show`` puts one into the network."""
        self.groups = groups
        self.show = show if groups > 1 else only_one

    def receive(self, start: Start) -> None:
        """Take what the server sends the next cohort."""
        self.received = start

    def training_step(self, cohort: Cohort, batch_idx: int) -> dict[str, Any]:
        """Run the whole local training of a cohort: its update."""
        start, self.received = self.received, None
        assert start is not None  # the protocol has sent it
        update = self.clients.train(start, cohort)
        if self.trainer.is_last_batch:
            self.optimizers().step()  # type: ignore[union-attr]
        return {"update": update}

    def on_train_end(self) -> None:
        """Give the network's layers back their own backward."""
        self.clients.release()

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients: they are views into the row, and None would unbind them."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate the G global models on a batch: logits (B, G, classes), labels (B,) and losses (B, G)."""
        x, y = batch
        found, losses = [], []
        for group in range(self.groups):
            self.show(group)
            logits = self.net(self.inputs(x))
            found.append(logits)
            losses.append(self.losses(partial(_given, logits), x, y))
        self.show(0)
        return {"logits": torch.stack(found, 1), "y": y, "losses": torch.stack(losses, 1)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep K, which may have been measured."""
        checkpoint["cohort"] = self.cohort


# Lightning asks for this signature at every batch; a stored one is found at once
setattr(ClientModule.training_step, "__signature__", inspect.signature(ClientModule.training_step))  # noqa: B010
