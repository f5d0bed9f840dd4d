"""Exports a pruned run as a small dense model, and loads it: what ``python -m fedsparse.export`` carries out."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsparse.core import files
from fedsparse.core.folder import EXPORT, WEIGHTS
from fedsparse.core.timing import interleaved
from fedsparse.core.weights import load_weights, save_weights
from fedsparse.job import earlier, trust
from fedsparse.job import model as nets
from fedsparse.job.finished import Finished, inputs, read_run
from fedsparse.job.sweep import locked
from fedsparse.models.flops import pruning_figures
from fedsparse.models.shrink import TOLERANCE, Cut, close, shrink
from fedsparse.models.structure import rebuild, structure
from fedsparse.models.to_onnx import onnx_forward, write_onnx

Forward = Callable[[Tensor], Tensor]
FORMATS = ("safetensors", "onnx")
CONFIG, ONNX, FIGURES = "config.json", "model.onnx", "figures.json"
SECONDS = 4.0  # of timing, for each runner


def export(folder: Path, formats: Sequence[str] = FORMATS, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Shrink a run's model, check it against the pruned one, measure it and write it.

    Args:
        folder: of a finished run.
        formats: some of ``FORMATS``.
        trusted: packages whose code the run may name.

    Returns:
        The contents of ``figures.json``: ``before`` and ``after`` (``pruning_figures``, ``num_parameters``, ``bytes``
        by file), ``time`` by runner (median ratio to the pruned model), ``cuts`` and ``unit``.

    Raises:
        ValueError: an unknown format, no finished run, or outputs that do not agree; then nothing is written.

    """
    if not formats or set(formats) - set(FORMATS):
        raise ValueError(f"format={','.join(formats)} is unknown; give one or both of {', '.join(FORMATS)}")
    run = read_run(folder, trusted)
    with locked(folder):
        for left in folder.glob(".export-*"):  # of a killed export
            shutil.rmtree(left, ignore_errors=True)
        small, cuts = shrink(run.net, inputs(run, seed=0))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            full, new = Path(scratch) / "full", Path(scratch) / EXPORT
            for path, net in ((full, run.net), (new, small)):
                path.mkdir()
                write(path, net, run, formats)
            figures = measure(run, small, cuts, full, new, trusted)
            files.write(new / FIGURES, json.dumps(figures, indent=2) + "\n")
            shutil.rmtree(folder / EXPORT, ignore_errors=True)
            os.replace(new, folder / EXPORT)
    return figures


def load(folder: str | os.PathLike[str], trusted: Sequence[str] = ()) -> nn.Module:
    """Build the smaller network of an ``export`` folder, in eval mode.

    Args:
        folder: written by ``export``.
        trusted: packages whose code it may name.

    Raises:
        ValueError: files are missing, damaged, inconsistent, or name code of another package.

    """
    path = Path(folder)
    try:
        stored, tensors = json.loads((path / CONFIG).read_text(encoding="utf-8")), load_weights(path / WEIGHTS)
        arguments, sizes = earlier.renewed(stored["net"]), stored["modules"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        text = f"{path} holds no exported model ({type(error).__name__}: {error})"
        raise ValueError(
            f"{text}; python -m fedsparse.export run=<run folder> writes {CONFIG} and {WEIGHTS}"
        ) from error
    return rebuild(nets.make_net(trust.admitted(arguments, trusted)), sizes, tensors).eval()


def write(folder: Path, net: nn.Module, run: Finished, formats: Sequence[str]) -> None:
    """Write a network in these formats."""
    if "safetensors" in formats:
        save_weights(net, folder / WEIGHTS)
        stored = {"net": run.arguments, "modules": structure(run.net, net), "input": list(run.real.shape[1:])}
        files.write(folder / CONFIG, json.dumps(stored, indent=2) + "\n")
    if "onnx" in formats:
        write_onnx(net, inputs(run, seed=0), folder / ONNX)


def measure(
    run: Finished, small: nn.Module, cuts: Sequence[Cut], full: Path, new: Path, trusted: Sequence[str] = ()
) -> dict[str, Any]:
    """Check the written models against the pruned one, and compare size and time."""
    x = inputs(run, seed=1)
    runners: dict[str, tuple[Forward, Forward]] = {"torch": (run.net, small)}
    if (new / WEIGHTS).exists():
        runners["torch"] = (run.net, load(new, trusted))
    if (new / ONNX).exists():
        before, after = (onnx_forward(path / ONNX, torch.get_num_threads()) for path in (full, new))
        runners["onnx"] = (before, after)
    for name, (_, forward) in runners.items():
        check(name, forward, run.net, x)
    return {
        "before": _figures(run.net, x, full),
        "after": _figures(small, x, new),
        "time": {name: _ratio(*forwards, x) for name, forwards in runners.items()},
        "cuts": [asdict(cut) for cut in cuts],
        "unit": run.unit,
    }


@torch.no_grad()
def check(name: str, after: Forward, before: Forward, x: Tensor) -> None:
    """Refuse a smaller model whose outputs differ, on a batch of all inputs or of one.

    Raises:
        ValueError: outputs differ by more than ``TOLERANCE``.

    """
    for batch in (x, x[:1]):
        output, expected = after(batch.clone()), before(batch.clone())
        if not close(output, expected):
            off = float((output - expected).abs().max()) if output.shape == expected.shape else float("inf")
            raise ValueError(f"the smaller model ({name}) differs by {off:.1e}, more than {TOLERANCE}: nothing written")


def _figures(net: nn.Module, x: Tensor, folder: Path) -> dict[str, Any]:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name in (WEIGHTS, ONNX)}
    return {"num_parameters": sum(p.numel() for p in net.parameters()), **pruning_figures(net, x), "bytes": sizes}


@torch.no_grad()
def _ratio(before: Forward, after: Forward, x: Tensor) -> float:
    """Time both in turn, for ``SECONDS`` but 7 to 101 pairs; returns the median of after / before."""
    works = {name: lambda f=f: f(x.clone()) for name, f in (("before", before), ("after", after))}
    once = sum(taken[0] for taken in interleaved(works, 1).values())
    times = interleaved(works, max(7, min(101, int(SECONDS / once))))
    return statistics.median(b / a for a, b in zip(times["before"], times["after"], strict=True))
