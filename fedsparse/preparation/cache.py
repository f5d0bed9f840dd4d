"""Cache of prepared heads and calibrated masks, by the fingerprint of all that they depend on.

Cells of a sweep that differ in learning rate, rounds or server share head and mask.
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
HOUR = 3600.0  # age after which an unfinished file is that of a killed job


@dataclass(frozen=True)
class Cache:
    """A folder of prepared heads and masks; a cached one counts the same bytes as its preparation.

    Args:
        folder: of the cache; None: nothing is cached.

    """

    folder: str | None

    def head(
        self, preparation: Preparation, config: Mapping[str, Any], patterns: Patterns, make: Callable[[], None]
    ) -> None:
        """Prepare the network's head by ``make``, or read it from the cache.

        Args:
            preparation: inputs of the head's preparation.
            config: the options that ``make`` depends on, plain values.
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
        """Calibrate by ``make``, or read the masks of an equal calibration from the cache."""

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
        """Read tensors and metadata from the cache, or make and write them."""
        if self.folder is None:
            return make()
        path = Path(self.folder) / f"{fingerprint(preparation, config)}.safetensors"
        cached = _load(path)
        if cached is None:
            tensors, metadata = make()
            try:
                _store(path, tensors, {"metadata": metadata, "ledger": preparation.ledger.state_dict()})
            except OSError as error:  # the run goes on without the cache
                log.warning("calibration.cache=%s keeps nothing (%s)", self.folder, error.strerror or error)
            return tensors, metadata
        preparation.ledger.load_state_dict(cached[1]["ledger"])
        return cached[0], cached[1]["metadata"]


def fingerprint(preparation: Preparation, config: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of configuration, initial weights, data, partition, ledger and code.

    Of data on the disk, names, sizes and modification times are hashed, not the bytes.
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
    """Compute the SHA-256 of the package's source."""
    digest = hashlib.sha256()
    root = Path(fedsparse.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def source_of(thing: object) -> str:
    """Compute the SHA-256 of the file that defines an object's class, which may lie outside the package.

    Without a source file, as in a notebook, changes cannot be detected: a random value.
    """
    try:
        file = inspect.getsourcefile(type(thing))
    except (TypeError, OSError):
        file = None
    readable = file is not None and Path(file).is_file()
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and readable else secrets.token_hex(32)


def _store(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a file atomically, since two jobs of a sweep may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files.clear(path.parent, age=HOUR)
    files.write(path, save(whole, {"json": json.dumps(metadata)}))


def _load(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """Read a cached file; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = json.loads(file.metadata()["json"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
