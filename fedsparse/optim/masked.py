"""Base of the client optimizers: a mask for each parameter, and moments of trained coordinates only.

Shapes: n coordinates of a parameter train; K clients may be its first dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from fedsparse.core.checks import check_tensors
from fedsparse.optim.index import TrainedIndex, laid_like


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimizer that changes no bit where a mask is False; its state has fingerprints of the masks, not the masks.

    Args:
        params: tensors, named tensors or dicts of groups, as for every ``torch.optim.Optimizer``.
        defaults: the options.
        masks: one for each parameter, over all groups in order: bool, True where a coordinate trains; None trains all.

    Attributes:
        moments: keys of the state with a value for each coordinate that trains.
        real: whether parameters must be real.

    Raises:
        ValueError: an option outside its range, parameters of another kind, or masks that do not fit them.

    """

    moments: ClassVar[tuple[str, ...]]
    real: ClassVar[bool] = True

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], masks: Sequence[Tensor | None] | None = None
    ) -> None:
        self.check(defaults)
        self._indices: dict[Tensor, TrainedIndex] = {}
        super().__init__(params, defaults)
        if masks is not None:
            self.set_masks(masks)

    @staticmethod
    @abstractmethod
    def check(options: dict[str, Any]) -> None:
        """Refuse an option outside its range, by its config key."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the state in place, so that the next step is a first step."""

    @abstractmethod
    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Step the trained coordinates of one parameter."""

    @abstractmethod
    def _init_state(self, param: Tensor, group: dict[str, Any], clients: int) -> None:
        """Create a parameter's state for K clients, with zeros where it does not exist."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their options; they train whole until the next ``set_masks``.

        Raises:
            ValueError: an option outside its range, or parameters of another kind.

        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        check_tensors(type(self).__name__, self.param_groups[-1]["params"], self.real)

    @torch.no_grad()
    def set_masks(self, masks: Sequence[Tensor | None]) -> None:
        """Set the masks, keep the moments of the coordinates that train, and drop all others.

        Args:
            masks: one for each parameter, over all groups in order: bool of the parameter's shape; None trains all.

        Raises:
            ValueError: their number, a shape or a dtype is wrong; the masks are then unchanged.

        """
        params = [p for group in self.param_groups for p in group["params"]]
        if len(masks) != len(params):
            raise ValueError(f"masks has {len(masks)} entries, but there are {len(params)} parameters; give one each")
        for index, (mask, param) in enumerate(zip(masks, params, strict=True)):
            _check_mask(index, mask, param)
        partial = {p: m for p, m in zip(params, masks, strict=True) if m is not None and not bool(m.all())}
        before, self._indices = self._indices, {p: TrainedIndex.of(m, p) for p, m in partial.items()}
        for param in params:
            state, trained = self.state.get(param, {}), self._indices.get(param)
            for name in [name for name in self.moments if state.get(name) is not None]:
                whole = _spread(state[name], before.get(param), param)
                state[name] = whole if trained is None else trained.gather(whole)

    @property
    def index_bytes(self) -> int:
        """Bytes of the indices of all masks."""
        return sum(trained.positions.nbytes for trained in self._indices.values())

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

    def update(self) -> None:
        """Step without closure, hooks and torch's profiler range, which take longer than a small step."""
        with torch.no_grad():  # a decorator would make a new context in every call
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, param.grad, group)

    @torch.no_grad()
    def rows(self, count: int) -> list[list[Tensor]]:
        """View the state of each of K clients, which are the first dimension of every parameter.

        For a step that some clients do not take: copy their views before it and write the copies back after it, with
        their rows of the parameters. Missing state is created, and reset state is zero, before it is viewed, so that
        this holds for a first step too. The views are valid until the next ``set_masks``.

        Args:
            count: K.

        Returns:
            K lists; views of any shape, as clients may train different numbers of coordinates.

        """
        found: list[list[Tensor]] = [[] for _ in range(count)]
        for group in self.param_groups:
            for param in group["params"]:
                self._init_state(param, group, count)
                for views in self._views(param, count):
                    for client, view in zip(found, views, strict=True):
                        client.append(view)
        return found

    def _views(self, param: Tensor, clients: int) -> Iterator[Sequence[Tensor]]:
        """Yield each tensor of a parameter's state, split by clients."""
        state, trained = self.state[param], self._indices.get(param)
        for name in self.moments:
            if name in state:
                yield state[name].unbind(0) if trained is None else trained.by_client(state[name], clients)
        if "step" in state:
            yield state["step"].unbind(0)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers have it, with the fingerprints of the masks of its moments."""
        found = super().state_dict()
        for stored, group in zip(found["param_groups"], self.param_groups, strict=True):
            stored["masks"] = [self._fingerprint(param) for param in group["params"]]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError: its moments belong to another mask than the one that is set.

        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        stored = [mask for group in groups for mask in group.pop("masks", [None] * len(group["params"]))]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, (before, param) in enumerate(zip(stored, params, strict=False)):
            trained = self._indices.get(param)
            kept = number in state_dict["state"]
            if kept and before is not None and trained is not None and before != trained.fingerprint:
                raise ValueError(
                    f"the moments of parameter {number} were stored under another mask; give that one before loading"
                )
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _fingerprint(self, param: Tensor) -> int | None:
        """Fingerprint of the mask of a parameter's moments; None without moments or mask."""
        trained, state = self._indices.get(param), self.state.get(param, {})
        return trained.fingerprint if trained is not None and any(name in state for name in self.moments) else None

    def _zeros(self, param: Tensor) -> Tensor:
        """Build a moment of zeros for the trained coordinates."""
        trained = self._indices.get(param)
        return torch.zeros_like(param) if trained is None else param.new_zeros(trained.gathered)

    def __getstate__(self) -> dict[str, Any]:
        """Include the masks in a ``copy.deepcopy``; ``state_dict`` does not have them."""
        return {**super().__getstate__(), "_indices": self._indices}


def fitted(moment: Tensor | None, trained: TrainedIndex | None, param: Tensor) -> Tensor | None:
    """Fit a moment, if there is one, to the trained coordinates; one that was stored without a mask is gathered."""
    if moment is None or moment.shape == (param.shape if trained is None else trained.gathered):
        return moment
    return _spread(moment, None, param) if trained is None else trained.gather(_spread(moment, None, param))


def _spread(moment: Tensor, trained: TrainedIndex | None, param: Tensor) -> Tensor:
    """Spread a moment over the whole parameter, with zeros where it did not train.

    Raises:
        ValueError: a moment of another number of coordinates: it was stored under another mask.

    """
    if moment.numel() != (param.numel() if trained is None else trained.numel):
        raise ValueError(
            f"momentum of {moment.numel()} coordinates does not fit a parameter of {param.numel()}: it was stored "
            "under another mask; give that one before loading"
        )
    return laid_like(moment, param) if trained is None else trained.scatter(moment, param)


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
