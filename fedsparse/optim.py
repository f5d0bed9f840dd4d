"""SparseSGDM: stochastic gradient descent with momentum that moves only the coordinates a mask lets train.

The arithmetic is ``sgdm_update``; the class keeps momentum and masks beside the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor

from fedsparse.places import Place, laid_like

_WORTH = 1 << 14  # coordinates from which one sweep beats the overhead of its kernel
_REGISTERS = 64  # coordinates; a multiple of what any processor's registers hold
_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")


def sgdm_update(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None = None,
    *,
    lr: float,
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
        lr: eta.
        momentum: mu.
        dampening: tau.
        weight_decay: lambda.
        nesterov: whether to look ahead.
        fresh: whether to overwrite ``buffer`` as a first step does.

    Returns:
        The momentum for the next step; None without momentum.

    >>> param = torch.tensor([1.0, 2.0])
    >>> sgdm_update(param, torch.tensor([1.0, 0.0]), lr=0.5)
    >>> param
    tensor([0.5000, 2.0000])
    """
    if _one_sweep(param, grad, buffer, momentum):
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        _update_in_one_sweep(param, grad, buffer, nesterov=nesterov, fresh=fresh, **options)
        return buffer
    direction = grad if weight_decay == 0 else grad.add(param, alpha=weight_decay)
    if momentum != 0:
        buffer = _accumulate(buffer, direction, momentum, dampening, fresh)
        direction = direction.add(buffer, alpha=momentum) if nesterov else buffer
    param.add_(direction, alpha=-float(lr))  # -float: an integer lr of 0 would add +0.0, which changes -0.0
    return buffer


def _accumulate(buffer: Tensor | None, direction: Tensor, momentum: float, dampening: float, fresh: bool) -> Tensor:
    """Take the direction into the momentum, as ``torch.optim.SGD`` does: two roundings, not one fused."""
    if buffer is None:
        return direction.clone()
    if fresh:
        return buffer.copy_(direction)
    return buffer.mul_(momentum).add_(direction, alpha=1 - dampening)


def _one_sweep(param: Tensor, grad: Tensor, buffer: Tensor | None, momentum: float) -> bool:
    """Whether torch's fused kernel can take the step, and is worth its overhead."""
    if param.numel() < max(_WORTH, _REGISTERS) or param.device.type != "cpu" or (buffer is None and momentum != 0):
        return False
    tensors = [param, grad, *([] if buffer is None else [buffer])]
    return all(t.is_contiguous() and t.dtype == param.dtype in (torch.float32, torch.float64) for t in tensors)


def _update_in_one_sweep(
    param: Tensor, grad: Tensor, buffer: Tensor | None, *, momentum: float, fresh: bool, **options: Any
) -> None:
    """Take a step in one sweep over the memory.

    The kernel makes the bits of the separate operations where it works on whole registers. The rest of a tensor it
    would round otherwise, so that is left to them.
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


class SparseSGDM(torch.optim.Optimizer):
    """SGD with momentum for any module; where a mask is False it changes no bit, whatever the gradient.

    Where it trains it equals ``torch.optim.SGD(foreach=False)`` bit for bit. Weight decay and momentum act on trained
    coordinates only, and only they have momentum: a mask costs four bytes for each of them, and nothing for the others.
    A coordinate that a new mask freezes stops at once; one that trains again starts from zero momentum. The optimizer's
    state is the momentum; masks are not part of it: give them before a state is loaded.

    Args:
        params: tensors, named tensors or dicts of groups, as for every ``torch.optim.Optimizer``.
        lr: step size, positive and finite; a schedule may change it later, also to 0.
        momentum: in [0, 1).
        dampening: share of the gradient that momentum ignores, 0 or more; not in the first step.
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
        defaults = dict(zip(_OPTIONS, (lr, momentum, dampening, weight_decay, nesterov), strict=True))
        _check_options(defaults)
        self._places: dict[Tensor, Place] = {}
        super().__init__(params, defaults)
        if masks is not None:
            self.set_masks(masks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; they train whole until the next ``set_masks``.

        Raises:
            ValueError: an option outside its range.

        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def set_masks(self, masks: Sequence[Tensor | None]) -> None:
        """Let only these coordinates train from now on, and forget the momentum of the others.

        Args:
            masks: beside the parameters, over all groups in order: bool of the parameter's shape; None trains all.

        Raises:
            ValueError: their number, a shape or a dtype is wrong; the masks then stay as they were.

        """
        params = [p for group in self.param_groups for p in group["params"]]
        if len(masks) != len(params):
            raise ValueError(f"masks has {len(masks)} entries, but there are {len(params)} parameters; give one each")
        for index, (mask, param) in enumerate(zip(masks, params, strict=True)):
            _check_mask(index, mask, param)
        partial = {p: m for p, m in zip(params, masks, strict=True) if m is not None and not bool(m.all())}
        before, self._places = self._places, {p: Place.of(m, p) for p, m in partial.items()}
        for param in params:
            if (buffer := self.state.get(param, {}).get("momentum_buffer")) is not None:
                whole = _spread(buffer, before.get(param), param)
                place = self._places.get(param)
                self.state[param]["momentum_buffer"] = whole if place is None else place.gather(whole)

    @property
    def index_bytes(self) -> int:
        """Bytes that the masks cost, beside the momentum of what trains."""
        return sum(place.index.nbytes for place in self._places.values())

    def reset(self) -> None:
        """Forget the momentum, so that the next step is a first step; its memory is kept and overwritten then."""
        for state in self.state.values():
            state["fresh"] = True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient; gradients stay as they are.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """Do what ``step`` does, without torch's hooks and profiler range, which cost more than a small step itself."""
        for group in self.param_groups:
            options = {name: group[name] for name in _OPTIONS}
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, options)

    def _update(self, param: Tensor, grad: Tensor, options: dict[str, Any]) -> None:
        """Step one parameter where it trains, with its momentum if it has any."""
        place, state = self._places.get(param), self.state[param] if options["momentum"] else {}
        buffer, fresh = state.get("momentum_buffer"), state.get("fresh", False)
        if place is None:
            if buffer is not None and buffer.shape != param.shape:
                buffer = _spread(buffer, None, param)
            buffer = _update_whole(param, grad, buffer, fresh, options)
        else:
            buffer = _update_at(place, param, grad, buffer, fresh, options)
        if options["momentum"]:
            state["momentum_buffer"], state["fresh"] = buffer, False

    def __getstate__(self) -> dict[str, Any]:
        """Keep the masks in a ``copy.deepcopy``; ``state_dict`` leaves them out."""
        return {**super().__getstate__(), "_places": self._places}


def _update_whole(
    param: Tensor, grad: Tensor, buffer: Tensor | None, fresh: bool, options: dict[str, Any]
) -> Tensor | None:
    """Step a parameter that trains whole."""
    if buffer is None and options["momentum"] and param.numel() >= _WORTH:
        buffer, fresh = torch.empty_like(param), True  # to be written in the same sweep
    return sgdm_update(param, grad, buffer, fresh=fresh, **options)


def _update_at(
    place: Place, param: Tensor, grad: Tensor, buffer: Tensor | None, fresh: bool, options: dict[str, Any]
) -> Tensor | None:
    """Step what trains of a parameter, a chunk after the other; the momentum of what trains, if any."""
    if buffer is None and options["momentum"]:
        buffer, fresh = place.gather(grad if grad.stride() == param.stride() else laid_like(grad, param)), True
    elif buffer is not None and buffer.numel() != place.numel:
        buffer = place.gather(_spread(buffer, None, param))  # of a state that was stored without a mask
    seen, steep = place.see(param), place.see(grad if grad.stride() == param.stride() else laid_like(grad, param))
    for index, part in place.chunks(buffer):
        values = seen.index_select(place.dim, index)
        sgdm_update(values, steep.index_select(place.dim, index), part, fresh=fresh, **options)
        seen.index_copy_(place.dim, index, values)
    return buffer


def _spread(buffer: Tensor, place: Place | None, param: Tensor) -> Tensor:
    """Lay momentum out like its parameter, zero where nothing trained.

    Raises:
        ValueError: momentum of another number of coordinates: it was stored under another mask.

    """
    if buffer.numel() != (param.numel() if place is None else place.numel):
        raise ValueError(
            f"momentum of {buffer.numel()} coordinates does not fit a parameter of {param.numel()}: it was stored "
            "under another mask; give that one before loading"
        )
    return laid_like(buffer, param) if place is None else place.scatter(buffer, param)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse an option outside its range, by its config key."""
    lr, momentum, dampening, decay = (options[name] for name in _OPTIONS[:4])
    if not (_finite(lr) and lr > 0):
        raise ValueError(f"optimizer.lr must be a positive, finite number, not {lr!r}")
    if not (_finite(momentum) and 0 <= momentum < 1):
        raise ValueError(f"optimizer.momentum must be at least 0 and below 1, not {momentum!r}")
    for name, value in (("dampening", dampening), ("weight_decay", decay)):
        if not (_finite(value) and value >= 0):
            raise ValueError(f"optimizer.{name} must be a finite number of 0 or more, not {value!r}")
    if options["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError("optimizer.nesterov needs optimizer.momentum above 0 and optimizer.dampening=0")


def _finite(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_mask(index: int, mask: Any, param: Tensor) -> None:
    """Refuse a mask that does not fit its parameter."""
    if mask is None:
        return
    kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
    if kind != torch.bool:
        raise ValueError(f"masks[{index}] is {kind}; it must be a bool tensor of shape {tuple(param.shape)}, or None")
    if mask.shape != param.shape:
        raise ValueError(f"masks[{index}] has shape {tuple(mask.shape)}; its parameter has {tuple(param.shape)}")
    if sum((size - 1) * step for size, step in zip(param.shape, param.stride(), strict=True)) + 1 > param.numel() > 0:
        raise ValueError(f"masks[{index}] is for a parameter with gaps in its memory; give a contiguous one, or None")
