"""A network's state as a safetensors file: a tensor with several names is stored once, and loaded under all names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fedsparse.core import files


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state into distinct tensors and the names of duplicates.

    Returns:
        Tensors on the CPU that share no memory, and for each left-out name the stored one: the metadata of safetensors'
        ``save_model``, so that ``load_model`` reads the file too.

    >>> whole = torch.arange(4.0)
    >>> tensors, names = pack({"a": whole, "b": whole, "half": whole[2:]})
    >>> {name: tensor.tolist() for name, tensor in tensors.items()}, names
    ({'a': [0.0, 1.0, 2.0, 3.0], 'half': [2.0, 3.0]}, {'b': 'a'})
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        key = _storage_key(tensor)
        if tensor.numel() and key in first:
            names[name] = first[key]
            continue
        first[key] = name
        memory = tensor.untyped_storage().data_ptr()
        stored = tensor.detach().cpu().contiguous()
        tensors[name] = stored.clone() if memory in seen else stored
        seen.add(memory)
    return tensors, names


def distinct(state: Mapping[str, Tensor]) -> list[Tensor]:
    """List the distinct tensors of a state; one with several names is listed once."""
    return list({_storage_key(tensor): tensor for tensor in state.values()}.values())


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Build a key of a tensor's memory and layout, which is equal for tensors that are the same."""
    layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (tensor.data_ptr() or id(tensor), *layout)


def save_weights(net: nn.Module, path: Path) -> None:
    """Save a network's state, by its names, to a file."""
    files.write(path, save(*pack(net.state_dict())))


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a safetensors file, tensors with several names under all of them.

    Raises:
        SafetensorError: the file is damaged, or has another format.

    """
    with safe_open(os.fspath(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = file.metadata() or {}
    return tensors | {name: tensors[kept] for name, kept in names.items() if kept in tensors and name not in tensors}


def check_savable(net: nn.Module) -> None:
    """Test, before a run trains, that a network's state can be saved and loaded; no file is written.

    Raises:
        ValueError: it cannot; one line with the reason.

    """
    state = net.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(
            f"the model cannot be saved: {', '.join(other[:4])} in its state_dict is no tensor (of get_extra_state?)"
        )
    try:
        save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in pack(state)[0].items()})
        net.load_state_dict({name: tensor.clone() for name, tensor in state.items()})  # clones, or nothing is copied
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the model cannot be saved and read again ({type(error).__name__}: {said})") from error
