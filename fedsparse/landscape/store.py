"""The folder ``landscape`` of a run: surfaces, figures, and the key of what each was computed from.

Shapes: A and B points of the axes, M models that are marked.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.core import files
from fedsparse.core.folder import LANDSCAPE, LANDSCAPE_FIGURES
from fedsparse.landscape.surface import Evaluated

OF_MODELS = ("models", "coordinates", "distance", "own_loss", "own_accuracy")
POINT = 2 * 8  # bytes of a point in a partial surface: loss and accuracy, float64


@dataclass(frozen=True)
class Surface:
    """Losses of a plane's points on one split, and the models that are marked in it.

    Attributes:
        a: coordinates of the first axis, float64 (A,).
        b: of the second axis, float64 (B,).
        loss: float64 (A, B); NaN is a gap.
        accuracy: float64 (A, B).
        errors: of a spline through fewer points, largest error of loss and accuracy at held-out points, as a part of
            their range (2,); 0 where all points were evaluated.
        evaluated: points.
        models: names (M,).
        coordinates: of the models, float64 (M, 2).
        distance: of the models from the plane, float64 (M,): the surface under one off the plane is not its loss.
        own_loss: of the models themselves, float64 (M,).
        own_accuracy: float64 (M,).
        lengths: of the two directions, float64 (2,), in the distances of rows.
        shares: of a trajectory's variance along either axis; empty for planes of another kind.
        seed: of directions and samples.
        data_hash: of the split.
        key: of all that the surface depends on.

    """

    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    errors: np.ndarray
    evaluated: np.ndarray
    models: np.ndarray
    coordinates: np.ndarray
    distance: np.ndarray
    own_loss: np.ndarray
    own_accuracy: np.ndarray
    lengths: np.ndarray
    shares: np.ndarray
    seed: np.ndarray
    data_hash: np.ndarray
    key: np.ndarray

    def until(self, count: int) -> Surface:
        """Take the same surface with the first models alone."""
        marked = {name: vars(self)[name][:count] for name in OF_MODELS}
        return replace(self, **marked)

    @property
    def gaps(self) -> int:
        """Points without a finite loss."""
        return int(np.isnan(self.loss).sum())

    def figures(self) -> dict[str, Any]:
        """Give what landscape.json says of it."""
        present = self.loss[~np.isnan(self.loss)]
        named = zip(self.models.tolist(), self.coordinates.tolist(), self.distance.tolist(), strict=True)
        own = zip(self.own_loss.tolist(), self.own_accuracy.tolist(), strict=True)
        models = {
            name: {"coordinates": at, "distance": far, "loss": loss, "accuracy": accuracy}
            for (name, at, far), (loss, accuracy) in zip(named, own, strict=True)
        }
        low, high = (float(present.min()), float(present.max())) if len(present) else (math.nan, math.nan)
        figures = {"points": self.loss.size, "gaps": self.gaps, "lowest_loss": low, "highest_loss": high}
        figures |= {"evaluated": int(self.evaluated), "errors": self.errors.tolist()}
        return figures | {"shares": self.shares.tolist(), "data_sha256": str(self.data_hash), "models": models}


class Store:
    """Reads and writes the folder ``landscape`` of a run.

    Args:
        run: the run folder.
        round: rounds closed, of an earlier round than the last; it gets a folder of its own.

    Attributes:
        folder: where everything lies.
        earlier: figures of the last call.

    """

    def __init__(self, run: Path, round: int | None = None) -> None:
        self.folder = run / LANDSCAPE if round is None else run / LANDSCAPE / f"round_{round}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.earlier = _read(self.folder / LANDSCAPE_FIGURES)

    def part(self, name: str, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Take a part's figures if they have this key, else compute and write them."""
        kept = self.earlier.get(name)
        if isinstance(kept, dict) and kept.get("key") == key:
            return kept
        self.earlier[name] = {"key": key, **_without_gaps(compute())}
        self._write(self.earlier)
        return self.earlier[name]

    def surface(self, name: str, key: str, compute: Callable[[], Surface]) -> Surface:
        """Take a surface if it has this key, else compute and write it."""
        path = self.folder / f"{name}.npz"
        kept = _read_surface(path)
        if kept is not None and str(kept.key) == key:
            return kept
        found, content = compute(), io.BytesIO()
        np.savez_compressed(content, **vars(found))
        files.write(path, content.getvalue())
        for left in self.folder.glob(f"{name}.*.part"):
            left.unlink()
        return found

    def points(self, name: str, key: str, count: int, rest: Callable[[int], Iterable[Evaluated]]) -> Evaluated:
        """Evaluate points chunk by chunk, each appended to a partial file at once: a kill loses one.

        Args:
            name: of the surface.
            key: of the surface; the partial file of another one is no help.
            count: all points.
            rest: evaluates what follows after so many points.

        """
        path = self.folder / f"{name}.{key[:16]}.part"
        if path.is_symlink():  # of a folder that somebody else has made
            path.unlink()
        content = path.read_bytes() if path.is_file() else b""
        whole = min(len(content) // POINT, count)
        if whole * POINT != len(content):
            files.write(path, content[: whole * POINT])
        if whole < count:
            for chunk in rest(whole):
                files.append(path, torch.stack(list(chunk), 1).contiguous().numpy().tobytes())
        values = torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.float64).reshape(count, 2).copy())
        return Evaluated(values[:, 0], values[:, 1])

    def finish(self, said: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write landscape.json: these figures, and those of earlier calls if they are of the same models.

        Args:
            said: the options, and hashes of all that every figure depends on.
            figures: parts by name.

        Returns:
            What this call was asked for, with None for gaps.

        """
        same = all(self.earlier.get(name, value) == value for name, value in said.items() if name != "options")
        kept = {name: part for name, part in self.earlier.items() if isinstance(part, dict) and "key" in part and same}
        asked: dict[str, Any] = _without_gaps({**said, **figures})
        self._write({**kept, **asked})
        return asked

    def _write(self, figures: Mapping[str, Any]) -> None:
        files.write(self.folder / LANDSCAPE_FIGURES, json.dumps(figures, indent=2, allow_nan=False) + "\n")


def numbers(values: Tensor) -> np.ndarray:
    """Move figures to the CPU as float64."""
    return values.detach().double().cpu().numpy()


def _read(path: Path) -> dict[str, Any]:
    """Read the figures of the last call; a damaged file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_surface(path: Path) -> Surface | None:
    """Read a surface; None where there is none, or a damaged one."""
    try:
        with np.load(path) as file:
            return Surface(**{name: file[name] for name in file.files})
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _without_gaps(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _without_gaps(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_gaps(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
