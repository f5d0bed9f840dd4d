"""The cells of a sweep: a folder each, named after its overrides, so that a sweep started again goes on with them.

On a SLURM cluster, ``python -m fedsparse.train -m hydra.sweep.dir=runs/grid seed=0,1,2 hydra/launcher=submitit_slurm
hydra.launcher.timeout_min=240 hydra.launcher.max_num_timeout=20 hydra.launcher.signal_delay_s=300`` submits a job for
each cell. Before its time is up, or when it is preempted, the job gets SIGUSR2, closes and saves the round (so that the
delay is to be longer than a round), and is queued again, at most 20 times for want of time. ``submitit_local`` does the
same on one machine; ``joblib`` with ``hydra.launcher.n_jobs`` runs many small cells in few processes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from fedsparse.core import files
from fedsparse.core.folder import LOCK, TRACES

LONGEST = 120  # characters of a folder's name: file systems end at 255, and paths hold more than one
# what does not shape a run's figures, or may grow
MAY_DIFFER = (
    "federation.rounds",
    "logger",
    "pictures",
    "resume",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "data.stream",
    "data.workers",
    "calibration.cache",
)


class CellFailed(ValueError):
    """A cell of a sweep failed, and has said why.

    Args:
        why: a line.
        keep: whether its folder must stay: more stands in its run.log, or another process is at work there.

    """

    def __init__(self, why: str, keep: bool = False) -> None:
        super().__init__(why)
        self.keep = keep


class FolderHeld(ValueError):
    """Another process is at work in a run folder."""

    keep = True


def cell_name(overrides: Sequence[str], leave_out: Sequence[str] = ()) -> str:
    """Name the folder of a cell after its overrides, whatever their order.

    The name may stand unquoted in a shell and as a value of an override. A name that had to be changed or cut ends in
    a part of the SHA-256 of the whole.

    Args:
        overrides: such as ``seed=1``.
        leave_out: keys that do not make another cell.

    >>> cell_name(["seed=1", "mask_rule=random", "logger=csv"], leave_out=["logger"])
    'mask_rule-random+seed-1'
    >>> cell_name(["data.root=/my data"])
    'data.root--my-data-2acd1af061'
    """
    kept = sorted(o.lstrip("+") for o in overrides if o.lstrip("+").partition("=")[0] not in leave_out)
    name = re.sub(r"[^\w.+-]", "-", "+".join(kept), flags=re.ASCII)
    if len(name) <= LONGEST and all(re.fullmatch(r"[\w.]+=[\w.-]*", o, re.ASCII) for o in kept):
        return name or "default"
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:10]
    return f"{name[: LONGEST - 11]}-{digest}"


def used(folder: Path) -> bool:
    """Whether a folder holds a run that got as far as its first round."""
    return any((folder / name).exists() for name in TRACES)


def shown(folder: Path) -> str:
    """Write a folder for people: from the working directory if it lies below that."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def already_used(folder: Path) -> str:
    """Say that a folder holds a run that this command did not start, and the ways on."""
    return f"{folder} already holds a run; continue it with resume={folder}, or choose another folder"


def difference(stored: DictConfig, asked: DictConfig) -> str | None:
    """Say the highest key in which two configurations are not those of the same run, or None.

    >>> difference(OmegaConf.create({"seed": 0, "logger": {}}), OmegaConf.create({"seed": 1, "logger": None}))
    'seed is 0 there and 1 here'
    """
    there, here = (dict(_flat(cfg)) for cfg in (stored, asked))
    words = [dict(_flat(cfg, resolve=False)) for cfg in (stored, asked)]
    for key in sorted(there.keys() | here.keys(), key=lambda key: (key.count("."), key)):
        same = words[0].get(key) == words[1].get(key)  # such as ${federation.rounds}: compared under that key
        if there.get(key) != here.get(key) and not same and not _may_differ(key):
            return f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
    return None


def _may_differ(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in MAY_DIFFER)


def _flat(cfg: DictConfig, resolve: bool = True) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a configuration, interpolations resolved or not; lists and empty groups are values."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict) or not node:
            yield path, node
            return
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}" if path else str(key))

    yield from walk(OmegaConf.to_container(cfg, resolve=resolve), "")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes off a run folder; the system lets go of it when the process ends, however it ends.

    What killed writers left there goes.

    Raises:
        FolderHeld: another process is at work in it.
        ValueError: it holds links.

    """
    files.refuse_links(folder)
    files.unshare(folder / LOCK)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderHeld(f"{folder} is being run by another process; wait for it, or choose another folder") from None
    try:
        for place in files.WRITTEN_WHOLE:
            files.clear(folder / place)
        yield
    finally:
        lock.release()
