"""The row of one client as one tensor: few operations, where ``BoundRow`` saves passes over a CPU's memory.

Shapes: P coordinates, B samples of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace, always
from fedsparse.core.targets import Weigh
from fedsparse.federation.client.bound import Forward, Losses, normalised
from fedsparse.models.units import compute_all_units, compute_units_only, trained_units

Gradients = Callable[[Tensor, Sequence[Tensor], Tensor], list[Tensor]]


class WholeRow:
    """The row of a cohort of one, into which the network's parameters are views; the optimizer steps it whole.

    Autograd returns the gradients, and one call copies them into the row's: nothing is added to zeros, and nothing is
    cleared. Frozen tensors, and frozen units of linear layers, get no gradient; the row's stays zero there. So a GPU
    has few kernels to launch, and a CPU little to do beside a small network's own work.

    Args:
        net: the network.
        space: its federated tensors.
        theta: the row (1, P), with its gradient of zeros.
        mask: bool (P,), True where some client trains.
        losses: of every sample of a batch: (forward, x, y) -> (B,).
        forward: the network, or its compiled form.
        weigh: weights of the samples in a batch's mean; None: all are equal.
        by_unit: whether frozen units of linear layers get no gradient; small layers are faster without.

    Attributes:
        views: the row, as a list.
        gradients: of it, as a list.

    """

    def __init__(
        self,
        net: nn.Module,
        space: ParamSpace,
        theta: Tensor,
        mask: Tensor,
        losses: Losses,
        forward: Forward,
        weigh: Weigh | None = None,
        by_unit: bool = True,
    ) -> None:
        assert theta.grad is not None
        self.net, self.space, self.losses, self.forward = net, space, losses, forward
        self.row, self.grad, self.weigh = theta[0], theta.grad[0], weigh
        self.row.grad = self.grad
        self.views, self.gradients = [self.row], [self.grad]
        self.compute = gradients if theta.device.type == "cpu" else public  # a GPU does not wait for Python
        marks = space.unflatten(mask)
        self.trained = [name for name in space.names if bool(marks[name].any())]
        self.units = trained_units(net, marks) if forward is net and by_unit else {}  # compiled code has its own layers
        slots = space.unflatten(self.grad)
        self.slots = [slots[name] for name in self.trained]
        self.leaves, self.places = self._bound()
        self.equal: dict[tuple[int, torch.dtype], Tensor] = {}  # weights of so many samples, made once

    def bind(self) -> None:
        """Bind the network again, after the data of its parameters was replaced."""
        self.leaves, self.places = self._bound()

    def _bound(self) -> tuple[list[nn.Parameter], list[int]]:
        """Make the network's parameters views into the row, and its layers skip frozen units: leaves, and where."""
        self.space.bind(self.net, self.row, self.grad, set(self.trained).__contains__, apart=always)
        compute_units_only(self.net, self.units, returned=True)
        leaves = [self.net.get_parameter(name) for name in self.trained]
        return leaves, [leaf.data_ptr() for leaf in leaves]

    def intact(self) -> bool:
        """Whether the network's parameters are still views into the row; ``.to()`` may replace their data."""
        return [leaf.data_ptr() for leaf in self.leaves] == self.places

    def backward(self, x: Tensor, y: Tensor, count: Sequence[int], scale: Tensor | None) -> Tensor:
        """Compute the gradient of the mean loss over the real samples.

        Args:
            x: inputs (B, ...).
            y: labels (B,), or sequences of targets (B, L).
            count: number of real samples of the one client.
            scale: factor of the loss (1,), or None.

        Returns:
            The mean loss (), not scaled.

        """
        real = count[0]
        if real < len(y):
            x, y = x[:real], y[:real]
        losses = self.losses(self.forward, x, y)
        if self.weigh is not None:
            weight = normalised(self.weigh(y)).to(losses)
        elif (key := (real, losses.dtype)) in self.equal:
            weight = self.equal[key]
        else:
            weight = self.equal[key] = losses.new_full((real,), 1 / real)
        scaled = weight if scale is None else weight * scale
        torch._foreach_copy_(self.slots, self.compute(losses, self.leaves, scaled))
        return losses.detach().mean() if self.weigh is None else (losses.detach() * weight).sum()

    def parts(self, row: Tensor) -> list[Tensor]:
        """View a row (P,) or (1, P) as ``views`` and ``gradients`` are: whole."""
        return [row.view(-1)]

    def clear(self) -> None:
        """Do nothing: the next backward overwrites the gradients."""

    def release(self) -> None:
        """Restore the backward of the network's layers."""
        compute_all_units(self.net)


def public(losses: Tensor, leaves: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Compute the gradients of sum(weight * losses) by torch's public function; zeros where there is none."""
    return list(torch.autograd.grad(losses, leaves, weight, materialize_grads=True))


def direct(losses: Tensor, leaves: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Compute the same by torch's autograd engine: (outputs, their gradients, keep graph, create graph, inputs, ...).

    The public function checks and rearranges its arguments in Python, which takes 40 us: a sixth of a small network's
    step. The engine's interface is private to torch, so that ``chosen`` tries it first.
    """
    run = torch.autograd.Variable._execution_engine.run_backward
    found: Sequence[Tensor | None] = run((losses,), (weight,), False, False, tuple(leaves), True, False)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def chosen(candidate: Gradients = direct) -> Gradients:
    """Choose a way to compute gradients: the candidate if it has the public function's result on an example.

    >>> chosen(lambda losses, leaves, weight: [weight]) is public
    True
    """

    def example(compute: Gradients) -> list[Tensor]:
        used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
        return compute(used * torch.tensor([3.0, 5.0]), [used, unused], torch.tensor([1.0, 2.0]))

    try:
        pairs = zip(example(candidate), example(public), strict=True)
        return candidate if all(torch.equal(a, b) for a, b in pairs) else public
    except (AttributeError, TypeError, ValueError, RuntimeError):  # another interface
        return public


gradients = chosen()
