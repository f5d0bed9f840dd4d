"""A mask: which coordinates train, tensor by tensor, under the network's own names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedsparse.core import files
from fedsparse.core.space import ParamSpace
from fedsparse.masks.shira import export

if TYPE_CHECKING:
    from peft import ShiraConfig

_ORDER = "order"  # safetensors sorts its tensors by name: the file's metadata keeps the order of the network


class Mask:
    """Which coordinates train, tensor by tensor, under the network's own names.

    The tensors are copies on the CPU; a mask is a file, a picture and a message, and its ``row`` is what trains.

    Args:
        tensors: bool tensors by parameter name, True where a coordinate trains.
        metadata: of the mask (rule, ratio), text by key; its file holds them.

    Raises:
        ValueError: a tensor that is not bool.

    >>> mask = Mask({"fc.weight": torch.tensor([[True, False]]), "fc.bias": torch.tensor([True])})
    >>> round(mask.density, 3), mask.by_layer()
    (0.667, {'fc': 0.6666666666666666})

    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        wrong = [name for name, tensor in tensors.items() if tensor.dtype != torch.bool]
        if wrong:
            raise ValueError(f"a mask holds bool tensors only; not bool: {_few(wrong)}")
        self.tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self.metadata = dict(metadata or {})

    @classmethod
    def of(cls, space: ParamSpace, row: Tensor, **metadata: str) -> Mask:
        """Build the mask of a row: bool (P,)."""
        return cls(space.unflatten(row), metadata)

    def row(self, space: ParamSpace) -> Tensor:
        """Lay the mask out as a row of a space: bool (P,), on the CPU.

        Raises:
            ValueError: the mask belongs to another model; the line names the tensors that differ.

        """
        if problems := "; ".join(self._differences(dict(zip(space.names, space.shapes, strict=True)))):
            raise ValueError(f"the mask was made for another model: {problems}")
        return _flat([self.tensors[name] for name in space.names])

    @property
    def density(self) -> float:
        """Fraction of the coordinates that trains."""
        return _density(self.tensors.values())

    def by_layer(self) -> dict[str, float]:
        """Give the density of every layer (a name without its last dotted part), in the order of the tensors."""
        layers: dict[str, list[Tensor]] = {}
        for name, tensor in self.tensors.items():
            layers.setdefault(name.rsplit(".", 1)[0], []).append(tensor)
        return {layer: _density(tensors) for layer, tensors in layers.items()}

    def overlap(self, other: Mask) -> float:
        """Compare with another mask by the Jaccard index, trained in both / trained in either; 1 if both are empty.

        Raises:
            ValueError: the masks differ in the names or shapes of their tensors.

        """
        self.check_same_model(other)
        pairs = [(tensor, other.tensors[name]) for name, tensor in self.tensors.items()]
        either = sum(int((a | b).count_nonzero()) for a, b in pairs)
        return sum(int((a & b).count_nonzero()) for a, b in pairs) / either if either else 1.0

    def check_same_model(self, other: Mask) -> None:
        """Refuse a mask of another model.

        Raises:
            ValueError: the masks differ in the names or shapes of their tensors.

        """
        if problems := "; ".join(self._differences({name: t.shape for name, t in other.tensors.items()})):
            raise ValueError(f"the masks belong to different models: {problems}")

    def export_shira(self, r: int, net: nn.Module | None = None) -> ShiraConfig:
        """Hand the mask to PEFT's SHiRA tuner: ``get_peft_model(net, mask.export_shira(r, net))``.

        See ``fedsparse.masks.shira.export``, also for the errors.
        """
        return export(self.tensors, r, net)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            OSError: the folder is missing or cannot be written, or the disk is full; an older file is left as it was.

        """
        metadata = self.metadata | {_ORDER: json.dumps(list(self.tensors))}
        files.write(Path(path), safetensors.torch.save(self.tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a safetensors file of bool tensors.

        Raises:
            ValueError: no file there, a damaged one, or tensors that are not bool.

        """
        if not Path(path).is_file():
            raise ValueError(f"no mask file at {os.fspath(path)}")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"the mask file {os.fspath(path)} cannot be read (damaged, or not safetensors): {error}"
            ) from error
        wrong = [name for name, t in tensors.items() if t.dtype != torch.bool or (t.view(torch.uint8) > 1).any()]
        if wrong:
            raise ValueError(f"the mask file {os.fspath(path)} must hold bool tensors (0 or 1) only; not {_few(wrong)}")
        return cls(_ordered(tensors, metadata.pop(_ORDER, "")), metadata)

    def to_bytes(self) -> bytes:
        """Pack the mask as a bitmap, 8 coordinates a byte, first one in the highest bit: what a server sends."""
        return np.packbits(_flat(self.tensors.values()).numpy()).tobytes()

    def _differences(self, shapes: Mapping[str, torch.Size]) -> Iterable[str]:
        """Say how the tensors differ from these names and shapes; empty if they agree."""
        own = self.tensors
        other = [
            f"{n} (mask {tuple(own[n].shape)}, model {tuple(s)})"
            for n, s in shapes.items()
            if n in own and own[n].shape != s
        ]
        found = {"missing": [n for n in shapes if n not in own], "extra": [n for n in own if n not in shapes]}
        return [f"{what} {_few(names)}" for what, names in (found | {"of another shape": other}).items() if names]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.bool), *(tensor.reshape(-1) for tensor in tensors)])


def _density(tensors: Iterable[Tensor]) -> float:
    counts = [(int(tensor.count_nonzero()), tensor.numel()) for tensor in tensors]  # sum() would make int64 copies
    return sum(ones for ones, _ in counts) / max(1, sum(size for _, size in counts))


def _few(names: list[str], limit: int = 4) -> str:
    """List the first few names for an error message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _ordered(tensors: dict[str, Tensor], order: str) -> dict[str, Tensor]:
    """Put tensors into the stored order; a file written by others has none and keeps its own."""
    try:
        names = json.loads(order)
    except ValueError:
        return tensors
    known = isinstance(names, list) and names and sorted(map(str, names)) == sorted(tensors)
    return {name: tensors[name] for name in names} if known else tensors
