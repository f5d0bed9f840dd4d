"""Scores of coordinates: the diagonal of the Fisher information, in two forms.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch, ``C`` classes.

The two forms order the coordinates differently, because the mean of squares is not the square of the mean: samples
whose gradients cancel count fully in the first and not at all in the second.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedsparse.core.checks import check_choice
from fedsparse.core.space import ParamSpace
from fedsparse.core.targets import IGNORED, cross_entropy
from fedsparse.masks.gradients import Forward, Losses, add_squares, gradients, own
from fedsparse.models.modes import evaluating

LabelledBatches = Iterable[tuple[Tensor, Tensor]]


def fisher(
    net: nn.Module,
    batches: LabelledBatches,
    *,
    per_sample: bool = True,
    labels: str = "data",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Estimate the diagonal of the Fisher information of the cross-entropy on some data, in eval mode.

    .. math:: s_j = \tfrac{1}{N} \sum_{i=1}^{N} \left( \partial \ell(x_i, y_i) / \partial \theta_j \right)^2

    Args:
        net: the network; it comes back as it was. Its trainable parameters (``requires_grad``) are scored.
        batches: pairs of inputs (b, ...) and labels (b,), N samples in all.
        per_sample: squared gradients of single samples; else of a batch's mean, times b (``fisher_batch``).
        labels: ``data``: those of the batches; ``model``: drawn from the model's softmax.
        generator: draws the labels; needed for ``labels="model"`` only.

    Returns:
        float64 (P,), the mean over samples, in the order of ``net.named_parameters()``.

    Raises:
        ValueError: no samples, nothing trainable, labels of another name, or ``model`` without a generator.

    """
    space = trainable_space(net)
    measure = fisher_per_sample if per_sample else fisher_batch
    total = torch.zeros(space.size, dtype=torch.float64, device=space.tensors(net)[0].device)
    seen = 0
    for x, y in batches:
        measure(net, space, x, y, loss=sample_losses, generator=generator, labels=labels, into=total)
        seen += len(x)
    if not seen:
        raise ValueError("the batches hold no samples, so there is nothing to take a mean of")
    return total.div_(seen)


def fisher_per_sample(
    net: nn.Module,
    space: ParamSpace,
    x: Tensor,
    y: Tensor,
    *,
    loss: Losses,
    generator: torch.Generator | None = None,
    labels: str = "data",
    chunk: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    r"""Sum the squared gradients of single samples: the diagonal of the (empirical) Fisher information, times b.

    .. math:: s_j = \sum_{i=1}^{b} \left( \partial \ell(x_i, y_i) / \partial \theta_j \right)^2

    With ``labels="model"`` the labels are drawn from the model's own softmax: the Fisher information of Amari (1998) in
    a one-sample estimate. With ``labels="data"`` it is the empirical Fisher (Kunstner et al. 2019, "Limitations of the
    empirical Fisher approximation"). A sum, so batches and clients add.

    Args:
        net: the network; it runs in eval mode and comes back in the mode it was in.
        space: the coordinates to score; parameters outside it stay as they are.
        x: inputs (b, ...).
        y: labels (b,), int64.
        loss: ``loss(forward, x, y)`` gives the losses (b,) of all samples; ``forward(x)`` gives the logits (b, C).
        generator: draws the labels; needed for ``labels="model"`` only.
        labels: ``data`` or ``model``.
        chunk: samples differentiated at once; None chooses by the size of the model (``automatic_chunk``).
        into: float64 (P,) to add to, in place; zeros by default.

    Returns:
        ``into``: float64 (P,).

    Raises:
        ValueError: labels of another name, or ``model`` without a generator.

    """
    total = _zeros(space, x) if into is None else into
    with evaluating(net):
        add_squares(total, net, space, x, _labels(net, x, y, labels, generator), loss=loss, chunk=chunk)
    return total


def fisher_batch(
    net: nn.Module,
    space: ParamSpace,
    x: Tensor,
    y: Tensor,
    *,
    loss: Losses,
    generator: torch.Generator | None = None,
    labels: str = "data",
    into: Tensor | None = None,
) -> Tensor:
    r"""Square the gradient of the mean loss, times b: the form of the original M8 project.

    .. math:: s_j = b \left( \partial \tfrac{1}{b} \sum_i \ell(x_i, y_i) / \partial \theta_j \right)^2

    One backward pass instead of b, but samples whose gradients cancel do not count, and the score depends on the batch
    size. The arguments, the result and the errors are those of ``fisher_per_sample``.
    """
    total = _zeros(space, x) if into is None else into
    with evaluating(net):
        y = _labels(net, x, y, labels, generator)
        found = gradients(net, own(net, space), x, y, loss)
    for part, gradient in zip(space.unflatten(total).values(), found, strict=True):
        part.add_(gradient.double().square() / max(1, len(x)))
    return total


def sample_losses(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    """Take the cross-entropy of every sample: (b,)."""
    return cross_entropy(forward(x), y)


def trainable_space(net: nn.Module) -> ParamSpace:
    """Build the space of the parameters that require a gradient.

    Raises:
        ValueError: there are none.

    """
    trainable = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the net requires a gradient, so there is nothing to score")
    return ParamSpace.of(net, trainable=trainable.__contains__)


def _zeros(space: ParamSpace, x: Tensor) -> Tensor:
    return torch.zeros(space.size, dtype=torch.float64, device=x.device)


def _labels(net: nn.Module, x: Tensor, y: Tensor, labels: str, generator: torch.Generator | None) -> Tensor:
    """Take the labels of the data, or draw them from the model's softmax, where there are targets."""
    check_choice("calibration.labels", labels, "data", "model")
    if labels == "data":
        return y
    if generator is None:
        raise ValueError("labels are to be drawn from the model (calibration.labels=model, TaLoS): hand in a generator")
    with torch.no_grad():
        chances = net(x.clone()).double().softmax(-1).to(generator.device)
    drawn = chances.flatten(0, -2).multinomial(1, generator=generator).view(y.shape).to(y.device)
    return torch.where(y == IGNORED, IGNORED, drawn)
