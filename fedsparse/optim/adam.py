"""SparseAdam: Adam and AdamW that step only the coordinates where a mask is True.

The arithmetic is ``adam_update``; the class keeps moments and step counts, and ``MaskedOptimizer`` the masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsparse.core.checks import check_flag, check_not_negative, check_positive, two_decays
from fedsparse.core.subspace import CHUNK
from fedsparse.optim.index import beside
from fedsparse.optim.masked import MaskedOptimizer, fitted

_OPTIONS = ("lr", "betas", "eps", "weight_decay", "decoupled")
Correction = tuple[float | Tensor, float | Tensor]


def adam_update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, correction: Correction, lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = False,
) -> None:  # fmt: skip
    r"""Take one step of Adam in place.

    .. math::
        g \leftarrow g + \lambda \theta, \quad m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \frac{\eta}{c_1} \frac{m}{\sqrt{v} / c_2 + \epsilon}

    (Kingma & Ba 2015, algorithm 1; decoupled: no decay in g, but :math:`\theta \leftarrow (1 - \eta \lambda) \theta`
    first, Loshchilov & Hutter 2019), in the form of ``torch.optim.Adam`` and ``AdamW``, to which it is bit-equal.

    Args:
        param: the tensor to move.
        grad: its gradient, of the same shape; not changed.
        exp_avg: m, changed in place.
        exp_avg_sq: v, changed in place.
        correction: c_1 and c_2, see ``corrections``; float64 tensors that broadcast to ``param`` where its rows have
            taken different numbers of steps.
        lr: eta; a float64 tensor that broadcasts to ``param`` where its rows have different ones.
        betas: beta_1 and beta_2.
        eps: epsilon, outside the root.
        weight_decay: lambda.
        decoupled: whether the decay is AdamW's.

    >>> param, m, v = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0])
    >>> adam_update(param, torch.tensor([3.0]), m, v, correction=corrections([1.0], (0.9, 0.999)), lr=0.5)
    >>> param
    tensor([0.5000])
    """
    if weight_decay != 0 and decoupled:
        kept = 1 - lr * weight_decay
        param.mul_(kept.to(param.dtype) if isinstance(kept, Tensor) else kept)
    elif weight_decay != 0:
        grad = grad.add(param, alpha=weight_decay)
    exp_avg.lerp_(grad, 1 - betas[0])
    root = exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1]).sqrt()
    first, second = correction
    if isinstance(first, Tensor) or isinstance(lr, Tensor):  # each number rounded once, as a number for all is
        first, second, step = (torch.as_tensor(value, dtype=torch.float64) for value in (first, second, -lr))
        root.div_(second.to(root)).add_(eps)
        rate = step.to(param.device) / first.to(param.device)  # a number over a tensor would be a reciprocal
        param.addcdiv_(exp_avg * rate.to(param.dtype), root)
    else:
        param.addcdiv_(exp_avg, root.div_(second).add_(eps), value=-(lr / first))


def corrections(steps: Sequence[float], betas: tuple[float, float]) -> Correction:
    """Compute the bias corrections of m and of the root of v, which start at 0 (Kingma & Ba 2015, section 3).

    Args:
        steps: of each of K rows, 1 or more.
        betas: beta_1 and beta_2.

    Returns:
        c_1 and c_2: numbers if all rows have taken the same number of steps, else float64 (K,).

    """
    first, second = ([1 - beta**step for step in steps] for beta in betas)
    roots = [value**0.5 for value in second]
    if len(set(steps)) == 1:
        return first[0], roots[0]
    return torch.tensor(first, dtype=torch.float64), torch.tensor(roots, dtype=torch.float64)


class SparseAdam(MaskedOptimizer):
    """Adam for any module of real parameters; where a mask is False it changes no bit, whatever the gradient.

    Elsewhere it equals ``torch.optim.Adam(foreach=False)``, or ``AdamW``, bit for bit. Weight decay and moments are of
    trained coordinates only: a mask costs four bytes for each of them, and nothing for the others. A coordinate that a
    new mask freezes stops at once; one that trains again starts from zero moments, with the parameter's count of
    steps. The state is torch's: ``exp_avg``, ``exp_avg_sq`` and ``step``, which is (K,) after a call of ``rows`` for K
    clients. Masks are not part of it: set them before a state is loaded.

    Args:
        params: tensors, named tensors or dicts of groups, as for every ``torch.optim.Optimizer``.
        lr: step size, positive and finite; a schedule may change it later, also to 0.
        betas: decay of the two moments, each in [0, 1).
        eps: positive, added to the root of the second moment; in the gradient's unit.
        weight_decay: 0 or more: L2 penalty added to the gradient or, decoupled, shrinking by lr times it.
        decoupled: whether it is AdamW.
        masks: beside the parameters, over all groups in order: bool tensors, True where a coordinate trains, or None.

    Raises:
        ValueError: an option outside its range, complex parameters, or masks that do not fit the parameters.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = SparseAdam([weight], lr=0.1, masks=[torch.tensor([True, False, True])])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 1.0000, 0.9000])
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        masks: Sequence[Tensor | None] | None = None,
    ) -> None:
        options = (lr, two_decays("optimizer.betas", betas), eps, weight_decay, decoupled)
        super().__init__(params, dict(zip(_OPTIONS, options, strict=True)), masks)

    @staticmethod
    def check(options: dict[str, Any]) -> None:
        """Refuse an option outside its range, by its config key.

        Raises:
            ValueError: one line that names it.

        """
        check_positive("optimizer.lr", options["lr"])
        two_decays("optimizer.betas", options["betas"])
        check_positive("optimizer.eps", options["eps"])
        check_not_negative("optimizer.weight_decay", options["weight_decay"])
        check_flag("optimizer.decoupled", options["decoupled"])

    def reset(self) -> None:
        """Set moments and step counts to 0, in place, so that the next step is a first step."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    def _init_state(self, param: Tensor, group: dict[str, Any], clients: int) -> None:
        """Create missing moments, and a step count for each of K clients."""
        state = self._made(param)
        if state["step"].numel() != clients or state["step"].dim() == 0:
            state["step"] = state["step"].expand(clients).clone()

    def _made(self, param: Tensor) -> dict[str, Any]:
        state, index = self.state[param], self._indices.get(param)
        for name in self.moments:
            moment = fitted(state.get(name), index, param)
            state[name] = self._zeros(param) if moment is None else moment
        state.setdefault("step", torch.zeros(()))
        return state

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Step the trained coordinates of one parameter."""
        state, options = self._made(param), {name: group[name] for name in _OPTIONS}
        state["step"] += 1
        first, second = corrections(state["step"].view(-1).tolist(), options["betas"])
        lr, index, m, v = options.pop("lr"), self._indices.get(param), *(state[name] for name in self.moments)
        if index is None:
            apart = any(isinstance(value, Tensor) for value in (first, lr))
            first, second, lr = (beside(value, param) for value in (first, second, lr))
            for theta, g, *parts in _cache_chunks(param, grad, m, v, whole=apart):
                adam_update(theta, g, *parts, correction=(first, second), lr=lr, **options)
            return
        for theta, g, moments, positions in index.trained(param, grad, m, v):
            one, two, rate = (beside(value, param, index, positions) for value in (first, second, lr))
            adam_update(theta, g, *moments, correction=(one, two), lr=rate, **options)


def _cache_chunks(*tensors: Tensor, whole: bool) -> Iterator[Sequence[Tensor]]:
    """Split a large parameter, its gradient and moments into chunks that fit in a CPU's cache."""
    if whole or tensors[0].device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        return iter([tensors])
    return zip(*(t.view(-1).split(CHUNK) for t in tensors), strict=True)
