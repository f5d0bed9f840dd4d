"""FedAdam, FedYogi, FedAdagrad (Reddi et al. 2021, algorithm 2) and a momentum as ``torch.optim`` optimizers.

The arithmetic is ``fedopt_update`` and a rule for the second moment; the classes keep the moments. Libraries differ
from the paper: torch's Adam always corrects the bias and starts from v = 0, and torch has no Yogi; the Yogi of
``pytorch_optimizer`` 4.1 always corrects v's bias, starts m at v's start, and counts steps without gradients.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from fedsparse.core.checks import check_flag, check_not_negative, check_positive, check_share, check_tensors, two_decays

_OPTIONS = ("lr", "betas", "tau", "bias_correction", "initial")
Rule = Callable[[Tensor, Tensor, float], Tensor]


def adam_moment(v: Tensor, grad: Tensor, beta: float) -> Tensor:
    r"""Update FedAdam's second moment in place: :math:`v \leftarrow \beta_2 v + (1 - \beta_2) g^2`."""
    return v.mul_(beta).addcmul_(grad, grad, value=1 - beta)


def yogi_moment(v: Tensor, grad: Tensor, beta: float) -> Tensor:
    r"""Update FedYogi's second moment in place: :math:`v \leftarrow v - (1 - \beta_2) g^2 \,\mathrm{sign}(v - g^2)`."""
    square = grad.square()
    return v.addcmul_(square, (v - square).sign_(), value=beta - 1)


def adagrad_moment(v: Tensor, grad: Tensor, beta: float) -> Tensor:
    r"""Update FedAdagrad's second moment in place: :math:`v \leftarrow v + g^2`; beta_2 is not used."""
    return v.addcmul_(grad, grad)


def fedopt_update(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: Rule, *,
    lr: float, betas: tuple[float, float], tau: float, correction: tuple[float, float] = (1.0, 1.0),
) -> None:  # fmt: skip
    r"""Take one step of FedOpt in place (Reddi et al. 2021, algorithm 2).

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \mathrm{rule}(v, g, \beta_2), \quad
        x \leftarrow x - \eta \frac{m / c_1}{\sqrt{v / c_2} + \tau}

    Args:
        param: x, of any shape.
        grad: g, the negative mean change; this and the moments have the shape of ``param``.
        m: first moment.
        v: second moment.
        rule: updates v in place: (v, g, beta_2) -> v.
        lr: eta.
        betas: beta_1 and beta_2.
        tau: degree of adaptivity, in the gradient's unit.
        correction: c_1 and c_2, the bias corrections; 1 in the paper's form.

    >>> x, m, v = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0])
    >>> fedopt_update(x, torch.tensor([3.0]), m, v, adagrad_moment, lr=0.5, betas=(0.0, 0.0), tau=1.0)
    >>> x, v
    (tensor([0.6250]), tensor([9.]))
    """
    m.lerp_(grad, 1 - betas[0])
    root = rule(v, grad, betas[1]).sqrt().div_(math.sqrt(correction[1]))
    param.addcdiv_(m, root.add_(tau), value=-lr / correction[0])


class FedOpt(torch.optim.Optimizer):
    """Base of the three: m and v of each parameter's shape exist from the start (``exp_avg``, ``exp_avg_sq``).

    A parameter without gradient stays as it is, moments and count of steps included.

    Args:
        params: tensors, named tensors or dicts of groups, as for every ``torch.optim.Optimizer``.
        lr: the server's step size, positive and finite.
        betas: decay of the two moments, each in [0, 1).
        tau: degree of adaptivity, positive, in the gradient's unit; stands outside the root.
        bias_correction: False is the paper's form; True divides the moments by 1 - beta^t, as Adam does.
        initial: v before the first step, 0 or more; None is the paper's tau^2, but 0 where v's bias is corrected, since
            that correction is for an average that started at 0.

    Raises:
        ValueError: an option outside its range.

    """

    averages: ClassVar[bool] = True  # whether v is an average, whose bias can be corrected, or a sum

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Sequence[float] = (0.9, 0.99),
        tau: float = 1e-3,
        bias_correction: bool = False,
        initial: float | None = None,
    ) -> None:
        options = (lr, two_decays("server.betas", betas), tau, bias_correction, initial)
        super().__init__(params, dict(zip(_OPTIONS, options, strict=True)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their options, and create their moments.

        Raises:
            ValueError: an option outside its range.

        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_tensors(type(self).__name__, group["params"])
        for param in group["params"]:
            v = torch.full_like(param, self._initial(group))
            self.state[param] = {"step": 0, "exp_avg": torch.zeros_like(v), "exp_avg_sq": v}

    def _initial(self, group: dict[str, Any]) -> float:
        """Value of v before the first step."""
        if group["initial"] is not None:
            return float(group["initial"])
        return 0.0 if group["bias_correction"] and self.averages else float(group["tau"] ** 2)

    def _correction(self, group: dict[str, Any], step: int) -> tuple[float, float]:
        """Compute the bias corrections after so many steps; 1 without correction."""
        if not group["bias_correction"]:
            return 1.0, 1.0
        first, second = (1 - beta**step for beta in group["betas"])
        return first, second if self.averages else 1.0

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
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter."""
        state = self.state[param]
        state["step"] += 1
        options = {name: group[name] for name in ("lr", "betas", "tau")}
        correction = self._correction(group, state["step"])
        fedopt_update(param, grad, state["exp_avg"], state["exp_avg_sq"], self.rule, correction=correction, **options)

    @staticmethod
    @abstractmethod
    def rule(v: Tensor, grad: Tensor, beta: float) -> Tensor:
        """Update the second moment in place."""


class FedAdam(FedOpt):
    """FedAdam; with ``bias_correction`` it is ``torch.optim.Adam`` of eps = tau.

    >>> x = torch.zeros(1)
    >>> optimizer = FedAdam([x], lr=0.1, betas=(0.9, 0.99), tau=1e-3)
    >>> x.grad = torch.tensor([-1.0])  # the mean change is +1
    >>> optimizer.step()
    >>> x
    tensor([0.0990])
    """

    rule = staticmethod(adam_moment)


class FedYogi(FedOpt):
    """FedYogi: when changes become small, v decays more slowly than FedAdam's (Zaheer et al. 2018)."""

    rule = staticmethod(yogi_moment)


class FedAdagrad(FedOpt):
    """FedAdagrad: v only grows. The paper uses betas of 0; ``bias_correction`` applies to the first moment only."""

    rule = staticmethod(adagrad_moment)
    averages = False


class AveragedMomentum(torch.optim.SGD):
    r"""Server momentum as a running mean that starts at zero, as in AutoFLIP's code.

    .. math::
        v \leftarrow \beta v + (1 - \beta) g, \quad x \leftarrow x - \eta v, \quad v_0 = 0

    It is torch's SGD with ``dampening`` = beta except for the first step, which torch does not dampen: here v exists
    from the start, so that the first step is (1 - beta) g. The bias towards zero is not corrected.

    Args:
        params: tensors, named tensors or dicts of groups, as for every ``torch.optim.Optimizer``.
        lr: the server's step size, positive and finite.
        beta: decay of v, in [0, 1).

    Raises:
        ValueError: an option outside its range.

    >>> x = torch.zeros(1)
    >>> optimizer = AveragedMomentum([x], lr=1.0, beta=0.9)
    >>> x.grad = torch.tensor([-1.0])  # the mean change is +1
    >>> optimizer.step()
    >>> x
    tensor([0.1000])
    """

    def __init__(self, params: Iterable[Any], lr: float, beta: float = 0.9) -> None:
        check_positive("server.lr", lr)
        check_share("server.beta", beta)
        super().__init__(params, lr=lr, momentum=beta, dampening=beta)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, and create their v of zeros."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            self.state[param] = {"momentum_buffer": torch.zeros_like(param)}


def _check_options(options: dict[str, Any]) -> None:
    """Refuse an option outside its range, by its config key."""
    for name in ("lr", "tau"):
        check_positive(f"server.{name}", options[name])
    two_decays("server.betas", options["betas"])
    check_flag("server.bias_correction", options["bias_correction"])
    if options["initial"] is not None:  # None is tau^2
        check_not_negative("server.initial", options["initial"])
