"""A device that there is not: tensors that say they lie on it compute on the CPU, and meet only each other.

``with pretended():`` lets Lightning train on it. An operation that mixes its tensors with the CPU's raises ``Mixed``,
as CUDA would: index tensors, and tensors without dimensions, may lie on the CPU. What is saved from it is tagged as a
GPU's, so that loading it without ``map_location`` fails where there is none. Not covered: autocast, CUDA's own kernels.

``with pretended() as counts:`` counts what a GPU's host would wait for, by the line of fedsparse that asked, and the
kernels that it would launch.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import lightning.fabric.accelerators.cpu
import lightning.fabric.strategies.single_device
import torch
from lightning.pytorch.accelerators import cpu
from lightning.pytorch.strategies import single_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fedsparse

PACKAGE = str(Path(fedsparse.__file__).parent / "_").removesuffix("_")
DEVICE = torch.device("lazy:0")
TAG = "cuda:0"  # where a saved tensor says it lay
aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXED |= {aten._index_put_impl_.default, aten._unsafe_index_put.default}
COPIES = {"_to_copy", "copy_", "copy", "set_", "_foreach_copy_", "is_same_size"}  # these may cross


READ = {"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal"}
READ |= {"_local_scalar_dense", "is_nonzero", "multinomial", "allclose"}  # their result decides what the host does
VIEWS = {"view", "_unsafe_view", "detach", "alias", "split", "split_with_sizes", "unbind", "select", "slice", "expand"}
VIEWS |= {"permute", "t", "transpose", "unsqueeze", "squeeze", "as_strided", "_reshape_alias", "narrow", "lift_fresh"}
VIEWS |= {"empty", "empty_like", "empty_strided", "new_empty", "unfold", "diagonal", "_local_scalar_dense"}


@dataclass
class Counts:
    """What has been counted: waits by place, and launches in all and by operation."""

    waits: Counter = field(default_factory=Counter)
    launches: Counter = field(default_factory=Counter)

    def clear(self):
        """Begin again."""
        self.waits.clear()
        self.launches.clear()


COUNTS = Counts()


class Mixed(RuntimeError):
    """Tensors of two devices met in one operation."""


class Pretended(torch.Tensor):
    """A tensor on the pretended device; ``held`` is the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **layout)
        made.held = held
        return made

    def __repr__(self):
        return f"Pretended({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if name == "__set__" and owner is torch.Tensor.data and all(isinstance(a, Pretended) for a in args[:2]):
            args[0].held = args[1].held
        if name == "numpy":
            raise Mixed("a device's tensor has no numpy(): use Tensor.cpu()")
        if name == "tolist":
            COUNTS.waits[_place()] += 1
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on the pretended device are made by operations without one of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """Run an operation on the held tensors; its results lie where those of its operands do, or where it was told."""
    name, there = func._schema.name.split("::")[1], kwargs.get("device")
    leaves = tree_leaves((args, kwargs))
    on_device = any(isinstance(leaf, Pretended) for leaf in leaves)
    if not on_device and there != DEVICE:
        return func(*args, **kwargs)
    _check(func, name, args, leaves)
    _count(func, name, args, kwargs, on_device)
    wrapped = {}

    def held(leaf):
        if isinstance(leaf, Pretended):
            wrapped[id(leaf.held)] = leaf
            return leaf.held
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    lies_there = on_device if there is None else there == DEVICE

    def placed(leaf):
        if not isinstance(leaf, torch.Tensor) or not lies_there:
            return leaf
        return wrapped[id(leaf)] if id(leaf) in wrapped else Pretended(leaf)

    if name == "_fused_sdp_choice":
        return 0
    out = func(*tree_map(held, args), **tree_map(held, kwargs))
    if name in ("copy_", "set_"):
        return args[0]
    if name == "_to_copy" and out is getattr(args[0], "held", args[0]):
        out = out.clone()
    return tree_map(placed, out)


def _count(func, name, args, kwargs, on_device):
    """Count a launch, and a wait where the host reads, or copies without ``non_blocking``."""
    if name not in VIEWS:
        COUNTS.launches[name] += 1
    marks = args[1] if func in INDEXED and len(args) > 1 else ()
    by_bool = any(isinstance(mark, torch.Tensor) and mark.dtype is torch.bool for mark in marks)
    target = kwargs.get("device")
    crosses = name == "_to_copy" and target is not None and isinstance(args[0], Pretended) != (target == DEVICE)
    crosses |= name == "copy_" and isinstance(args[0], Pretended) != isinstance(args[1], Pretended)
    patient = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    if (on_device and (name in READ or by_bool)) or (crosses and not (patient and not isinstance(args[-1], Pretended))):
        COUNTS.waits[_place()] += 1


def _place():
    """Find the innermost line of fedsparse, or of what it calls where there is none."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}" if frame else "elsewhere"


def _check(func, name, args, leaves):
    """Raise where CUDA would."""
    ours = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretended)]
    if not (ours and others) or name in COPIES:
        return
    if func in INDEXED:
        if not isinstance(args[0], Pretended):
            raise Mixed(f"{func}: a CPU tensor is indexed by a device's")
        others = [value for value in args[2:3] if isinstance(value, torch.Tensor) and not isinstance(value, Pretended)]
    wide = [tuple(other.shape) for other in others if other.dim()]
    written = name.endswith("_") and not isinstance(args[0], Pretended)
    if wide or (written and isinstance(args[0], torch.Tensor)):
        raise Mixed(f"{func}: CPU tensors {wide} meet {[tuple(t.shape) for t in ours]} of a device")


@contextmanager
def pretended():
    """Let Lightning's Trainer and Fabric train on the pretended device, in this process."""
    from _pytest.monkeypatch import MonkeyPatch

    real_autocast, real_save, real_tag = torch.autocast, torch.save, torch.serialization.location_tag
    fabric = lightning.fabric
    with MonkeyPatch.context() as patch, _Factories():
        for kind in (single_device, fabric.strategies.single_device):
            patch.setattr(kind.SingleDeviceStrategy, "root_device", property(lambda self: DEVICE))
        for kind in (cpu.CPUAccelerator, fabric.accelerators.cpu.CPUAccelerator):
            patch.setattr(kind, "setup_device", lambda self, device: None)

        def autocast(kind, *args, **options):
            return nullcontext() if kind == DEVICE.type else real_autocast(kind, *args, **options)

        def save(data, *args, **options):
            ours = {t.held.untyped_storage()._cdata for t in tree_leaves(data) if isinstance(t, Pretended)}
            plain = tree_map(lambda leaf: leaf.held if isinstance(leaf, Pretended) else leaf, data)

            def tag(storage):
                return TAG if getattr(storage, "_untyped_storage", storage)._cdata in ours else real_tag(storage)

            with MonkeyPatch.context() as inner:
                inner.setattr(torch.serialization, "location_tag", tag)
                real_save(plain, *args, **options)

        patch.setattr(torch, "autocast", autocast)
        patch.setattr(torch, "save", save)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            COUNTS.clear()
            yield COUNTS
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
