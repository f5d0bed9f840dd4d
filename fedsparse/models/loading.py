"""Weights from a file into a net, all but the head; what does not fit is named, and no pickle is ever run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsparse.core.space import Patterns, matches
from fedsparse.core.weights import load_weights

TORCH = (".pth", ".pt", ".bin")
Fit = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
# where training scripts keep the weights inside their checkpoints; of DINO's two nets the teacher is the published one
NESTED = ("teacher", "student", "state_dict", "model")


def load_backbone(net: nn.Module, path: Path, head: Patterns = "head.*", fit: Fit | None = None) -> None:
    """Copy a file's tensors into a net, all but the head's.

    Args:
        net: changed in place.
        path: a file that ``read`` reads.
        head: glob patterns of the head's parameters, left out on both sides.
        fit: fits tensors to a net of another image size or other channels; asked where shapes differ.

    Raises:
        ValueError: the file is missing or damaged, or its tensors are not those of the net; says which.

    """
    found, wanted = (
        {name: tensor for name, tensor in tensors.items() if not matches(name, head)}
        for tensors in (read(path), net.state_dict())
    )
    if fit is not None and any(name in wanted and wanted[name].shape != found[name].shape for name in found):
        found = dict(fit(net, found))
    if differing := differences(wanted, found):
        raise ValueError(f"{path} does not fit the model: {differing}; model.checkpoint has to be of the same net")
    net.load_state_dict(found, strict=False)


def started(net: nn.Module, checkpoint: str, head: Patterns) -> nn.Module:
    """Return a builder's net with a file's tensors, all but the head's; arguments and errors of ``load_backbone``."""
    load_backbone(net, Path(checkpoint), head)
    return net


def read(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a file: safetensors, or a state dict that torch saved, bare or inside a checkpoint.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or holds more than weights.

    """
    if not path.is_file():
        raise ValueError(f"there is no model checkpoint {path}; model.checkpoint names a file of weights")
    if path.suffix == ".safetensors":
        return unwrapped(_read_safetensors(path))
    if path.suffix in TORCH:
        return unwrapped(_read_torch(path))
    raise ValueError(f"model.checkpoint={path} has to end in .safetensors, {', '.join(TORCH)}")


def unwrapped(found: Any) -> dict[str, Tensor]:
    """Find the backbone's tensors in what a training script saved, under the backbone's own names.

    DINO (Caron et al. 2021) publishes a bare backbone and a full checkpoint: ``student`` and ``teacher``, each a
    ``backbone`` with a projection head, the student inside a ``module``.

    >>> one = torch.ones(1)
    >>> sorted(unwrapped({"epoch": 1, "teacher": {"backbone.norm.bias": one, "head.mlp.0.bias": one}}))
    ['norm.bias']
    """
    if not isinstance(found, Mapping):
        return {}
    inner = next((found[key] for key in NESTED if isinstance(found.get(key), Mapping)), found)
    bare = {name.removeprefix("module."): value for name, value in inner.items() if isinstance(value, Tensor)}
    backbone = {n.removeprefix("backbone."): value for n, value in bare.items() if n.startswith("backbone.")}
    return backbone or bare


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Name the tensors that are missing, too many, of another shape, or not finite; empty when all fit.

    >>> differences({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3)})
    'missing b; of another shape a (3, not 2)'
    """
    shared = [name for name in wanted if name in found]
    reshaped = [name for name in shared if wanted[name].shape != found[name].shape]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [f"{n} ({_size(found[n])}, not {_size(wanted[n])})" for n in reshaped],
        "not finite": [name for name in shared if not found[name].isfinite().all()],
    }
    return "; ".join(f"{kind} {_shorten(names)}" for kind, names in kinds.items() if names)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_weights(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file ({error})") from error


def _read_torch(path: Path) -> Any:
    """Read what torch.save wrote, if it is tensors and plain values; DINO's full checkpoint also holds its options."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they lead to
        said = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or holds more than weights ({type(error).__name__}: {said})") from error


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _shorten(names: list[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
