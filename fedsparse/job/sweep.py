"""The cells of a sweep: each has a folder named after its overrides, so that a repeated sweep resumes them.

On a SLURM cluster, ``python -m fedsparse.train -m hydra.sweep.dir=runs/grid seed=0,1,2 hydra/launcher=submitit_slurm
hydra.launcher.timeout_min=240 hydra.launcher.max_num_timeout=20 hydra.launcher.signal_delay_s=300`` submits a job for
each cell. Before its time is up, or when it is preempted, the job gets SIGUSR2, closes and saves the round (the delay
must be longer than a round), and is queued again, at most 20 times after a timeout. ``submitit_local`` does the
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
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fedsparse.core import files
from fedsparse.core.folder import LOCK, TRACES

LONGEST = 120  # characters of a folder's name; file systems allow 255, but paths are limited too
# keys that do not change results, or may grow
MAY_DIFFER = (
    "federation.rounds",
    "logger",
    *(f"logger.wandb.{key}" for key in ("entity", "group", "job_type", "name", "notes", "tags")),
    "pictures",
    "resume",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "data.stream",
    "data.workers",
    "calibration.cache",
)

SAID_ELSEWHERE = ("model.image_side",)  # data.size refers to it, and older stored runs lack it


class CellFailed(ValueError):
    """A cell of a sweep failed, and its error was printed.

    Args:
        why: the message, one line.
        keep: whether its folder must stay, for its run.log or another process in it.

    """

    def __init__(self, why: str, keep: bool = False) -> None:
        super().__init__(why)
        self.keep = keep


class FolderHeld(ValueError):
    """Another process runs in a run folder."""

    keep = True


def cell_name(overrides: Sequence[str], leave_out: Sequence[str] = ()) -> str:
    """Name the folder of a cell after its overrides, sorted.

    The name needs no quotes in a shell or an override. A name with replaced or cut characters ends in 10 hex digits of
    the SHA-256 of all overrides.

    Args:
        overrides: such as ``seed=1``.
        leave_out: keys that are not part of the name.

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
    """Whether a folder holds a run that reached its first round."""
    return any((folder / name).exists() for name in TRACES)


def short_path(folder: Path) -> str:
    """Format a folder for messages: relative to the working directory if it lies below it."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def already_used(folder: Path) -> str:
    """Write the error line for a folder that holds another run."""
    return f"{folder} already holds a run; continue it with resume={folder}, or choose another folder"


def beside_others() -> bool:
    """Whether a launcher of Hydra runs several cells at the same time."""
    return HydraConfig.initialized() and not str(HydraConfig.get().launcher._target_).endswith("BasicLauncher")


def difference(stored: DictConfig, asked: DictConfig) -> str | None:
    """Describe the topmost key in which the configurations of two runs differ; None if the runs are the same.

    >>> difference(OmegaConf.create({"seed": 0, "logger": {}}), OmegaConf.create({"seed": 1, "logger": None}))
    'seed is 0 there and 1 here'
    """
    there, here = (dict(_flat(cfg)) for cfg in (stored, asked))
    unresolved = [dict(_flat(cfg, resolve=False)) for cfg in (stored, asked)]
    for key in sorted(there.keys() | here.keys(), key=lambda key: (key.count("."), key)):
        same = unresolved[0].get(key) == unresolved[1].get(key)  # equal interpolations: see their key
        if there.get(key) != here.get(key) and not same and not _may_differ(key):
            return f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
    return None


def _may_differ(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in (*MAY_DIFFER, *SAID_ELSEWHERE))


def _flat(cfg: DictConfig, resolve: bool = True) -> Iterator[tuple[str, Any]]:
    """Iterate over dotted keys and values of a configuration; lists and empty mappings are values."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict) or not node:
            yield path, node
            return
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}" if path else str(key))

    yield from walk(OmegaConf.to_container(cfg, resolve=resolve), "")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against other processes; the system releases the lock when the process ends or is killed.

    Temporary files of killed writers are removed.

    Raises:
        FolderHeld: another process holds the lock.
        ValueError: the folder holds links.

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
