"""Scores of coordinates: the diagonal of the Fisher information, in two forms.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch, ``c`` samples of a chunk, ``C`` classes.

The two forms order the coordinates differently, because the mean of squares is not the square of the mean: samples
whose gradients cancel count fully in the first and not at all in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsparse.space import ParamSpace

Forward = Callable[[Tensor], Tensor]
Losses = Callable[[Forward, Tensor, Tensor], Tensor]


def fisher_per_sample(
    net: nn.Module,
    space: ParamSpace,
    x: Tensor,
    y: Tensor,
    *,
    loss: Losses,
    generator: torch.Generator | None = None,
    labels: str = "data",
    chunk: int = 8,
) -> Tensor:
    r"""Sum the squared gradients of single samples: the diagonal of the (empirical) Fisher information, times b.

    .. math:: s_j = \sum_{i=1}^{b} \left( \partial \ell(x_i, y_i) / \partial \theta_j \right)^2

    With ``labels="model"`` the labels are drawn from the model's own softmax: the Fisher information of Amari (1998) in
    a one-sample estimate. With ``labels="data"`` it is the empirical Fisher (Kunstner et al. 2019, "Limitations of the
    empirical Fisher approximation"). A sum, so batches and clients add. A model that ``vmap`` cannot run
    (data-dependent control flow) takes one sample at a time, to the same result.

    Args:
        net: the network; it runs in eval mode and comes back in the mode it was in.
        space: the coordinates to score; parameters outside it stay as they are.
        x: inputs (b, ...).
        y: labels (b,), int64.
        loss: ``loss(forward, x, y)`` gives the losses (b,) of all samples; ``forward(x)`` gives the logits (b, C).
        generator: draws the labels; needed for ``labels="model"`` only.
        labels: ``data`` or ``model``.
        chunk: samples differentiated at once; memory grows by ``chunk`` gradients.

    Returns:
        float64 (P,), not negative.

    Raises:
        ValueError: labels of another name, or ``model`` without a generator.

    """
    with _evaluating(net):
        y = _labels(net, x, y, labels, generator)
        params = space.unflatten(space.read(net))
        total = torch.zeros(space.size, dtype=torch.float64, device=x.device)
        for inputs, targets in zip(x.split(chunk), y.split(chunk), strict=True):
            total += _squares(net, params, inputs, targets, loss)
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
) -> Tensor:
    r"""Square the gradient of the mean loss, times b: the form of the original M8 project.

    .. math:: s_j = b \left( \partial \tfrac{1}{b} \sum_i \ell(x_i, y_i) / \partial \theta_j \right)^2

    One backward pass instead of b, but samples whose gradients cancel do not count, and the score depends on the batch
    size. The arguments, the result and the errors are those of ``fisher_per_sample``.
    """
    with _evaluating(net):
        y = _labels(net, x, y, labels, generator)
        gradients = _gradients(net, space.unflatten(space.read(net)), x, y, loss)
    return len(x) * _flat((g.double() / max(1, len(x))).square() for g in gradients)


def _squares(net: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Losses) -> Tensor:
    """Sum the squared gradients of a chunk's samples: stacked where ``vmap`` can, else one by one."""
    try:
        return _flat(g.double().square().sum(0) for g in _stacked_gradients(net, params, x, y, loss))
    except RuntimeError:  # some operation of this model has no batching rule; a real error comes again below
        pass
    singles = zip(x.split(1), y.split(1), strict=True)
    return sum(
        (_flat(g.double().square() for g in _gradients(net, params, one, label, loss)) for one, label in singles),
        start=torch.zeros((), dtype=torch.float64, device=x.device),
    )


def _stacked_gradients(
    net: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Losses
) -> Iterable[Tensor]:
    """Differentiate every sample's loss at once: (c, *shape) for every tensor."""

    def single(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(_forward(net, params), x.unsqueeze(0), y.unsqueeze(0)).sum()

    # The CPU's fused attention has no batching rule: vmap would run it sample by sample, with a warning.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return vmap(grad(single), in_dims=(None, 0, 0))(dict(params), x, y).values()


def _gradients(net: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Losses) -> Iterable[Tensor]:
    """Differentiate the summed loss of some samples by plain autograd, which any module supports."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    with torch.enable_grad():
        total = loss(_forward(net, leaves), x, y).sum()
    return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)


def _forward(net: nn.Module, params: Mapping[str, Tensor]) -> Forward:
    """Bind the network to parameters; those that are not given stay its own."""
    return lambda x: functional_call(net, dict(params), (x,))


def _labels(net: nn.Module, x: Tensor, y: Tensor, labels: str, generator: torch.Generator | None) -> Tensor:
    """Take the labels of the data, or draw them from the model's softmax."""
    if labels == "data":
        return y
    if labels != "model":
        raise ValueError(f"calibration.labels must be 'data' or 'model', not {labels!r}")
    if generator is None:
        raise ValueError("calibration.labels=model draws labels from the model: hand in a generator")
    with torch.no_grad():
        chances = net(x).double().softmax(-1).to(generator.device)
    return chances.multinomial(1, generator=generator).squeeze(1).to(y.device)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Run every module in eval mode, then put each back into its own mode (some may have been frozen on purpose)."""
    before = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
