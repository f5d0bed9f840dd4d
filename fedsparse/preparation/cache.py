"""Prepared heads and calibrated masks, kept under the fingerprint of everything they depend on, and used again.

A cell of a sweep that differs in learning rate, rounds or server has the head and the mask of its neighbour.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import fedsparse
from fedsparse.core import files
from fedsparse.core.space import Patterns, matches
from fedsparse.masks import Mask
from fedsparse.preparation.calibration import Calibrated
from fedsparse.preparation.preparation import Preparation

log = logging.getLogger("fedsparse")
BITMAPS, MASK = "bitmaps", "mask/"
HOUR = 3600.0  # a file that nobody has written to for so long is of a job that was killed


@dataclass(frozen=True)
class Cache:
    """A folder of prepared things; the bytes that their making sent are counted as if it had been done again.

    Args:
        folder: where they are kept; None keeps nothing.

    """

    folder: str | None

    def head(
        self, preparation: Preparation, config: Mapping[str, Any], patterns: Patterns, make: Callable[[], None]
    ) -> None:
        """Let ``make`` prepare the network's head, or take the same one as before.

        Args:
            preparation: what the head is prepared on.
            config: plain values that its making reads.
            patterns: names of the head's parameters.
            make: changes the head in place.

        """

        def made() -> tuple[dict[str, Tensor], Any]:
            make()
            return {n: p.detach().cpu() for n, p in preparation.net.named_parameters() if matches(n, patterns)}, None

        tensors, _ = self._through(preparation, {"head": config}, made)
        with torch.no_grad():
            for name, tensor in tensors.items():
                preparation.net.get_parameter(name).copy_(tensor)

    def calibrated(
        self, preparation: Preparation, config: Mapping[str, Any], make: Callable[[], Calibrated]
    ) -> Calibrated:
        """Let ``make`` calibrate, or take the masks that the same calibration found before."""

        def made() -> tuple[dict[str, Tensor], Any]:
            found = make()
            tensors = {MASK + name: tensor for name, tensor in found.mask.tensors.items()}
            return tensors | {BITMAPS: found.bitmaps}, [found.mask.metadata, found.overlap]

        tensors, (metadata, overlap) = self._through(preparation, {"mask": config}, made)
        mask = {name: tensors[MASK + name] for name in preparation.space.names}
        return Calibrated(Mask(mask, metadata), tensors[BITMAPS], tuple(overlap))

    def _through(
        self, preparation: Preparation, config: Mapping[str, Any], make: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        """Read tensors and metadata, or make and write them."""
        if self.folder is None:
            return make()
        path = Path(self.folder) / f"{fingerprint(preparation, config)}.safetensors"
        kept = _load(path)
        if kept is None:
            tensors, metadata = make()
            try:
                _store(path, tensors, {"metadata": metadata, "ledger": preparation.ledger.state_dict()})
            except OSError as error:  # prepared it is, and the run goes on
                log.warning("calibration.cache=%s keeps nothing (%s)", self.folder, error.strerror or error)
            return tensors, metadata
        preparation.ledger.load_state_dict(kept[1]["ledger"])
        return kept[0], kept[1]["metadata"]


def fingerprint(preparation: Preparation, config: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration, the start, the data, who holds what, the ledger so far, and the code.

    Of data that lies on the disk, names, sizes and times of change stand for the bytes.
    """
    digest = hashlib.sha256()
    for piece in _pieces(preparation, config):
        digest.update(hashlib.sha256(piece).digest())
    return digest.hexdigest()


def _pieces(preparation: Preparation, config: Mapping[str, Any]) -> Iterator[bytes]:
    yield json.dumps(
        [config, preparation.seed, preparation.batch_size, repr(preparation.inputs)], sort_keys=True
    ).encode()
    yield json.dumps(
        [preparation.ledger.state_dict(), preparation.model_length, list(preparation.space.names)]
    ).encode()
    yield code_version().encode()
    yield (source_of(preparation.net) + source_of(getattr(preparation.losses, "__self__", None))).encode()
    for tensor in preparation.net.state_dict().values():
        yield _bytes(tensor)
    for split in (preparation.dataset.train, preparation.dataset.val):
        yield from (_bytes(split.x) if isinstance(split.x, Tensor) else split.x.stamp(), _bytes(split.y))
    for part in preparation.parts:
        yield part.tobytes()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@cache
def code_version() -> str:
    """SHA-256 of the package's own source."""
    digest = hashlib.sha256()
    root = Path(fedsparse.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def source_of(thing: object) -> str:
    """SHA-256 of the file that defines a thing's class, which may be a user's own, outside the package.

    Where there is none to read, as in a notebook, nobody knows whether it changed: a new value every time.
    """
    try:
        file = inspect.getsourcefile(type(thing))
    except (TypeError, OSError):
        file = None
    known = file is not None and Path(file).is_file()
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and known else secrets.token_hex(32)


def _store(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a file that appears whole: two jobs of a sweep may prepare the same thing at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files.clear(path.parent, age=HOUR)
    files.write(path, save(whole, {"json": json.dumps(metadata)}))


def _load(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """Read what is kept; a missing or damaged file is nothing."""
    if not path.is_file():
        return None
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = json.loads(file.metadata()["json"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
