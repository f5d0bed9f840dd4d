"""SparseSGDM: stochastic gradient descent with momentum that steps only the coordinates where a mask is True.

The arithmetic is ``sgdm_update``; the class keeps the momentum, and ``MaskedOptimizer`` the masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsparse.core.checks import check_flag, check_not_negative, check_positive, check_share
from fedsparse.optim.index import TrainedIndex, beside
from fedsparse.optim.masked import MaskedOptimizer, fitted

_WORTH = 1 << 14  # coordinates from which the fused kernel is faster, its overhead included
_REGISTERS = 64  # coordinates: a multiple of the vector length of all processors
_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")


def sgdm_update(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    fresh: bool = False,
) -> Tensor | None:
    r"""Take one step of SGD with momentum in place.

    .. math::
        d = g + \lambda \theta, \quad b \leftarrow \mu b + (1 - \tau) d, \quad
        \theta \leftarrow \theta - \eta b \quad (\text{nesterov: } \theta - \eta (d + \mu b))

    with :math:`b = d` in the first step (Sutskever et al. 2013, in the form of ``torch.optim.SGD``, to which it is
    bit-equal).

    Args:
        param: the tensor to move.
        grad: its gradient, of the same shape; not changed.
        buffer: momentum so far, changed in place; None before the first step and without momentum.
        lr: eta; a tensor that broadcasts to ``param`` where its rows have different ones.
        momentum: mu.
        dampening: tau.
        weight_decay: lambda.
        nesterov: whether the momentum is Nesterov's.
        fresh: whether to overwrite ``buffer``, as a first step does.

    Returns:
        The momentum for the next step; None without momentum.

    >>> param = torch.tensor([1.0, 2.0])
    >>> sgdm_update(param, torch.tensor([1.0, 0.0]), lr=0.5)
    >>> param
    tensor([0.5000, 2.0000])
    """
    by_row = isinstance(lr, Tensor) and lr.dim() > 0
    if not by_row and _one_sweep(param, grad, buffer, momentum):
        options = {"lr": float(lr), "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        _update_in_one_sweep(param, grad, buffer, nesterov=nesterov, fresh=fresh, **options)
        return buffer
    direction = grad if weight_decay == 0 else grad.add(param, alpha=weight_decay)
    if momentum != 0:
        if buffer is None:
            buffer = direction.clone()
        elif fresh:
            buffer.copy_(direction)
        else:  # two roundings as in torch.optim.SGD, not one fused
            buffer.mul_(momentum).add_(direction, alpha=1 - dampening)
        direction = direction.add(buffer, alpha=momentum) if nesterov else buffer
    if isinstance(lr, Tensor) and by_row:
        param.sub_(direction * lr.to(param.dtype))
        return buffer
    param.add_(direction, alpha=-float(lr))  # -float: an integer lr of 0 would add +0.0, which changes -0.0
    return buffer


def _one_sweep(param: Tensor, grad: Tensor, buffer: Tensor | None, momentum: float) -> bool:
    """Whether torch's fused kernel can take the step, and is faster."""
    if param.numel() < _WORTH or param.device.type != "cpu" or (buffer is None and momentum != 0):
        return False
    tensors = [param, grad, *([] if buffer is None else [buffer])]
    return all(t.is_contiguous() and t.dtype == param.dtype in (torch.float32, torch.float64) for t in tensors)


def _update_in_one_sweep(
    param: Tensor, grad: Tensor, buffer: Tensor | None, *, momentum: float, fresh: bool, **options: Any
) -> None:
    """Take a step in one pass over the memory, by torch's fused kernel.

    The kernel's results equal those of separate operations bit for bit in whole registers. It rounds the rest of a
    tensor differently, so that the rest is stepped by separate operations.
    """
    whole = param.numel() - param.numel() % _REGISTERS
    parts = [t.view(-1)[:whole] for t in (param, grad)]
    momenta = [buffer.view(-1)[:whole]] if buffer is not None and momentum != 0 else []
    torch._fused_sgd_(
        [parts[0]], [parts[1]], momenta, momentum=momentum, maximize=False, is_first_step=fresh, **options
    )
    if whole < param.numel():
        rest = None if buffer is None else buffer.view(-1)[whole:]
        sgdm_update(param.view(-1)[whole:], grad.view(-1)[whole:], rest, momentum=momentum, fresh=fresh, **options)


class SparseSGDM(MaskedOptimizer):
    """SGD with momentum for any module; where a mask is False it changes no bit, whatever the gradient.

    Elsewhere it equals ``torch.optim.SGD(foreach=False)`` bit for bit. Weight decay and momentum act on trained
    coordinates only, and only they have momentum: a mask costs four bytes for each of them, and nothing for the others.
    A coordinate that a new mask freezes stops at once; one that trains again starts from zero momentum. The optimizer's
    state is the momentum; masks are not part of it: set them before a state is loaded.

    Args:
        params: tensors, named tensors or dicts of groups, as for every ``torch.optim.Optimizer``.
        lr: step size, positive and finite; a schedule may change it later, also to 0.
        momentum: in [0, 1).
        dampening: share of the gradient that is not added to the momentum, 0 or more; none in the first step.
        weight_decay: L2 penalty, 0 or more, added to the gradient.
        nesterov: needs momentum and no dampening.
        masks: beside the parameters, over all groups in order: bool tensors, True where a coordinate trains, or None.

    Raises:
        ValueError: an option outside its range, or masks that do not fit the parameters.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = SparseSGDM([weight], lr=0.1, masks=[torch.tensor([True, False, True])])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 1.0000, 0.9000])
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    real: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        masks: Sequence[Tensor | None] | None = None,
    ) -> None:
        options = (lr, momentum, dampening, weight_decay, nesterov)
        super().__init__(params, dict(zip(_OPTIONS, options, strict=True)), masks)

    @staticmethod
    def check(options: dict[str, Any]) -> None:
        """Refuse an option outside its range, by its config key.

        Raises:
            ValueError: one line that names it.

        """
        momentum, dampening = options["momentum"], options["dampening"]
        check_positive("optimizer.lr", options["lr"])
        check_share("optimizer.momentum", momentum)
        check_flag("optimizer.nesterov", options["nesterov"])
        for name in ("dampening", "weight_decay"):
            check_not_negative(f"optimizer.{name}", options[name])
        if options["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0 and optimizer.dampening=0")

    def reset(self) -> None:
        """Mark the momentum as reset: the next step is a first step, which overwrites it in place."""
        for state in self.state.values():
            state["fresh"] = True

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Step the trained coordinates of one parameter, with its momentum if there is any."""
        options, index = {name: group[name] for name in _OPTIONS}, self._indices.get(param)
        state = self.state[param] if options["momentum"] else {}
        if index is None and isinstance(options["lr"], Tensor):
            options["lr"] = beside(options["lr"], param)
        buffer, fresh = fitted(state.get("momentum_buffer"), index, param), state.get("fresh", False)
        if index is None:
            buffer = _update_whole(param, grad, buffer, fresh, options)
        else:
            buffer = _update_at(index, param, grad, buffer, fresh, options)
        state.update(momentum_buffer=buffer, fresh=False)

    def _init_state(self, param: Tensor, group: dict[str, Any], clients: int) -> None:
        """Create the momentum as zeros, or zero it if it was reset; the next step is then still a first step.

        So a client whose first step comes later than the others' starts from zero momentum, which differs from a first
        step only with dampening.
        """
        if not group["momentum"]:
            return
        state = self.state[param]
        buffer = fitted(state.get("momentum_buffer"), self._indices.get(param), param)
        if buffer is None or state.get("fresh", False):
            buffer, state["fresh"] = self._zeros(param) if buffer is None else buffer.zero_(), True
        state["momentum_buffer"] = buffer


def _update_whole(
    param: Tensor, grad: Tensor, buffer: Tensor | None, fresh: bool, options: dict[str, Any]
) -> Tensor | None:
    """Step a parameter that trains whole."""
    if buffer is None and options["momentum"] and param.numel() >= _WORTH and not isinstance(options["lr"], Tensor):
        buffer, fresh = torch.empty_like(param), True  # written in the same pass
    return sgdm_update(param, grad, buffer, fresh=fresh, **options)


def _update_at(
    index: TrainedIndex, param: Tensor, grad: Tensor, buffer: Tensor | None, fresh: bool, options: dict[str, Any]
) -> Tensor | None:
    """Step the trained coordinates of a parameter in chunks; returns their momentum, if any."""
    lr = options["lr"]
    if buffer is None and options["momentum"]:
        buffer, fresh = param.new_empty(index.gathered), True
    for values, gradient, (part,), positions in index.trained(param, grad, buffer):
        of_clients = {"lr": beside(lr, param, index, positions)} if isinstance(lr, Tensor) else {}
        sgdm_update(values, gradient, part, fresh=fresh, **options | of_clients)
    return buffer
