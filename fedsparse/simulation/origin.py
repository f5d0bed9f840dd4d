"""A network as its builder made it: a checkpoint names what is still so by its hash, and holds only the rest.

Shapes: P coordinates of the space, of which m differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace, Patterns, matches
from fedsparse.federation.server.merging import again, base_of
from fedsparse.masks.bitmaps import pack, unpack

NET = "net."  # before the network's names in a checkpoint
LEFT_OUT = "left_out"  # the checkpoint's entry about what it does not hold
BUILT, ZERO = "built", "zero"  # what a coordinate is that the checkpoint does not hold
WORTH = 0.75  # above this share of coordinates that train or differ, all are stored: none depends on the builder
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes of a number
Print = tuple[str, tuple[int, ...], str]  # dtype, shape, SHA-256 of the bytes


@dataclass(frozen=True)
class Origin:
    """What the builder made of a network, before its head or any round changed it.

    Attributes:
        net: the network, in which what no checkpoint holds stays as it was built.
        space: its federated tensors.
        row: (P,), their values as built, on the CPU.
        prints: dtype, shape and hash of each tensor as built, by name.
        owners: the first name of each parameter, by all its names.
        still: names of the tensors that stay as built, and are never stored.

    """

    net: nn.Module = field(repr=False)
    space: ParamSpace
    row: Tensor = field(repr=False)
    prints: Mapping[str, Print] = field(repr=False)
    owners: Mapping[str, str] = field(repr=False)
    still: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, net: nn.Module, space: ParamSpace, fitted: Patterns = (), buffers: bool = False) -> Origin:
        """Take a network as it has just been built.

        Args:
            net: the network.
            space: its federated tensors.
            fitted: glob patterns of parameters that may change without being federated, as the head before the rounds.
            buffers: whether buffers stay as they are.

        """
        first: dict[int, str] = {}
        owners = {name: first.setdefault(id(p), name) for name, p in net.named_parameters(remove_duplicate=False)}
        changing = {*space.names, *(owner for name, owner in owners.items() if matches(name, fitted))}
        still = {name for name, owner in owners.items() if owner not in changing}
        if buffers:
            still |= {name for name, _ in net.named_buffers()} & net.state_dict().keys()
        state = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}  # no extra state
        prints = {name: _print(value) for name, value in state.items() if owners.get(name, name) == name}
        row = space.read(net).cpu()
        return cls(net, space, row, {name: prints[owners.get(name, name)] for name in state}, owners, frozenset(still))

    def packed(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out of a whole checkpoint what is as it was built; the mask is packed to bits."""
        state = dict(checkpoint["state_dict"])
        mask = state.pop("mask").cpu()
        for name in self.still:
            del state[NET + name]
        everything = int(mask.count_nonzero()) > WORTH * self.space.size
        row = {"base": None} if everything else self._differing([state[NET + name] for name in self.space.names])
        for name, owner in self.owners.items() if row["base"] is not None else ():
            if owner in self.space.names:
                del state[NET + name]
        known = {key: {name: self.prints[name] for name in names} for key, names in self._named().items()}
        return {**checkpoint, "state_dict": state, LEFT_OUT: {"mask": pack(mask), **known, **row}}

    def _named(self) -> dict[str, list[str]]:
        return {"still": sorted(self.still), "federated": list(self.space.names)}

    def _differing(self, tensors: list[Tensor]) -> dict[str, Any]:
        """Find a base from which few coordinates differ, in bits, and their values (m,); no base if there is none."""
        flat = [tensor.detach().reshape(-1).cpu() for tensor in tensors]
        for base, parts in ((BUILT, self.row.split(self.space.sizes)), (ZERO, [t.new_zeros(()) for t in flat])):
            marks = torch.cat([_bits(now) != _bits(then) for now, then in zip(flat, parts, strict=True)])
            if int(marks.count_nonzero()) <= WORTH * self.space.size:
                index = [torch.from_numpy(np.flatnonzero(mark.numpy())) for mark in marks.split(self.space.sizes)]
                values = torch.cat([now[at] for now, at in zip(flat, index, strict=True)])
                return {"base": base, "differs": pack(marks), "values": values}
        return {"base": None}

    def check(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of a run that began with other weights, where these are not in it.

        Raises:
            ValueError: one line with the tensors that differ.

        """
        left = checkpoint.get(LEFT_OUT)
        if left is None:
            return
        needed = left["still"] | (left["federated"] if left["base"] == BUILT else {})
        other = [name for name, wanted in needed.items() if self.prints.get(name) != wanted]
        if other:
            named = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
            raise ValueError(
                f"the model is built with other weights than this run began with ({named} differ), and its checkpoints "
                "hold only what has changed since: put the file of the weights back, or the version of torch, timm or "
                "transformers that built them, or begin a new run"
            )

    def whole(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in what a checkpoint leaves out: one as Lightning loads it, which ``packed`` turns into the given one.

        Args:
            checkpoint: as ``opened`` returns it, and ``check`` accepts it.

        """
        left = checkpoint.get(LEFT_OUT)
        if left is None:
            return dict(checkpoint)
        own = self.net.state_dict()
        state = checkpoint["state_dict"] | {NET + name: own[name] for name in left["still"]}
        if left["base"] is not None:
            row = self.row.clone() if left["base"] == BUILT else torch.zeros_like(self.row)
            row[unpack(left["differs"].unsqueeze(0), self.space.size)[0]] = left["values"]
            tensors = self.space.unflatten(row)
            state |= {NET + name: tensors[owner] for name, owner in self.owners.items() if owner in tensors}
        return {key: value for key, value in checkpoint.items() if key != LEFT_OUT} | {"state_dict": state}


def model_of(origin: Origin, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the network's state from a checkpoint, by its names: what it holds, what it leaves out, and what was merged.

    Args:
        origin: the network as the builder makes it, which is not changed.
        checkpoint: as ``read_checkpoint`` returns it.

    Raises:
        ValueError: the builder makes other weights than the run began with.

    """
    origin.check(checkpoint)
    whole = origin.whole(checkpoint)
    state = {name.removeprefix(NET): value for name, value in whole["state_dict"].items() if name.startswith(NET)}
    merging = whole["callbacks"]["FederatedRounds"].get("merging") or {"layers": {}}
    for layer, stored in merging["layers"].items():
        state[base_of(layer)] = state[base_of(layer)].clone()
        again(state[base_of(layer)], stored)
    return state


def opened(checkpoint: Mapping[str, Any], space: ParamSpace) -> dict[str, Any]:
    """Unpack the mask, bool (P,), of a checkpoint that leaves something out, and check what there is of the row.

    Raises:
        ValueError: its parts do not fit together, or its tensors have other names or shapes than the space; names them.

    """
    left, state = checkpoint.get(LEFT_OUT), checkpoint["state_dict"]
    if left is None:
        shapes = {name: state[NET + name].shape for name in space.names if NET + name in state}
    else:
        shapes = {name: torch.Size(shape) for name, (_, shape, _) in left["federated"].items()}
    wanted = dict(zip(space.names, space.shapes, strict=True))
    if other := [name for name, shape in wanted.items() if shapes.get(name) != shape]:
        raise OfAnotherModel(f"is of another model: {', '.join(other[:4])} differ")
    if left is None:
        return dict(checkpoint)
    if left["base"] is not None and len(left["values"]) != int(unpack(left["differs"].unsqueeze(0), space.size).sum()):
        raise ValueError("its values are not as many as its bits say")
    return {**checkpoint, "state_dict": state | {"mask": unpack(left["mask"].unsqueeze(0), space.size)[0]}}


class OfAnotherModel(ValueError):
    """The tensors of a checkpoint have other names or shapes than the model's."""


def _bits(values: Tensor) -> Tensor:
    """View numbers as integers of their bits, in which -0 is not 0 and a NaN is itself."""
    return values.view(BITS[values.element_size()])


def _print(tensor: Tensor) -> Print:
    """Hash a tensor's bytes, beside its dtype and shape."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest()
