"""fedsparse: sparse federated fine-tuning of pre-trained models, simulated on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from os import PathLike
from os.path import join
from typing import TYPE_CHECKING, Any

from fedsparse.core.lazy import lazily

__version__ = "0.1.0"
__path__.append(join(__path__[0], "renamed"))  # ``python -m fedsparse.attack`` and its like, for one release
__all__ = [
    "Aggregation",
    "ClientModule",
    "Clients",
    "Exchange",
    "FederatedDataModule",
    "FederatedRounds",
    "Federation",
    "Mask",
    "MaskRule",
    "Outcome",
    "Outcomes",
    "ParamSpace",
    "Server",
    "SparseAdam",
    "SparseSGDM",
    "Sparsity",
    "Topology",
    "run",
    "runs",
    "sweep",
    "weights",
]

if TYPE_CHECKING:
    from fedsparse.core.space import ParamSpace
    from fedsparse.data import FederatedDataModule
    from fedsparse.federation import Clients, Federation
    from fedsparse.federation.exchange import Exchange
    from fedsparse.federation.server import Aggregation, Server, Topology
    from fedsparse.job.outcome import Outcome, Outcomes
    from fedsparse.masks import Mask, MaskRule, Sparsity
    from fedsparse.optim import SparseAdam, SparseSGDM
    from fedsparse.simulation import ClientModule, FederatedRounds
else:  # ``import fedsparse`` costs nothing
    _HOMES = {
        "Aggregation": "fedsparse.federation.server",
        "ClientModule": "fedsparse.simulation",
        "Clients": "fedsparse.federation",
        "Exchange": "fedsparse.federation.exchange",
        "FederatedDataModule": "fedsparse.data",
        "FederatedRounds": "fedsparse.simulation",
        "Federation": "fedsparse.federation",
        "Mask": "fedsparse.masks",
        "MaskRule": "fedsparse.masks",
        "Outcome": "fedsparse.job.outcome",
        "Outcomes": "fedsparse.job.outcome",
        "ParamSpace": "fedsparse.core.space",
        "Server": "fedsparse.federation.server",
        "SparseAdam": "fedsparse.optim",
        "SparseSGDM": "fedsparse.optim",
        "Sparsity": "fedsparse.masks",
        "Topology": "fedsparse.federation.server",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)


def run(overrides: Sequence[str] = (), **keys: Any) -> Outcome:
    """Run as ``python -m fedsparse.train`` does, and return the summary; see ``fedsparse.train.run``.

    Args:
        overrides: what one would type, such as ``["mask_rule=random", "partition=noniid_nc1"]``.
        keys: the same as keywords, after these: ``mask_rule="random"``, ``federation={"rounds": 3}``.

    Returns:
        The figures by name, a dict, with ``folder``, ``model()``, ``mask()`` and ``metrics()`` of the run.

    """
    from fedsparse import train  # here, so that ``import fedsparse`` costs nothing

    return train.run(overrides, **keys)


def sweep(overrides: Sequence[str] = (), *, jobs: int = 1, **keys: Any) -> Outcomes:
    """Run every combination of what is swept, each in a folder of its own; see ``fedsparse.job.runs.sweep``.

    Args:
        overrides: what one would type after ``-m``, such as ``["mask_rule=random,dense"]``.
        jobs: cells at the same time.
        keys: the same as keywords, after these; a list is swept: ``seed=[0, 1]``.

    Returns:
        A row for each cell: what was swept, its figures and its folder; ``frame()`` is a DataFrame.

    """
    from fedsparse.job import runs  # here, so that ``import fedsparse`` costs nothing

    return runs.sweep(overrides, jobs=jobs, **keys)


def runs(folders: str | PathLike[str] | Iterable[str | PathLike[str]]) -> Any:
    """Read runs as a table: one row a run, finished or not; see ``fedsparse.analysis.runs_table.table``.

    Args:
        folders: run folders, or folders that hold some at any depth, such as those of several machines; or one folder.

    Returns:
        A pandas DataFrame where pandas is installed, else a list of dicts; never one and then the other.

    Raises:
        ValueError: a folder holds no run.

    """
    from fedsparse.analysis.runs_table import table  # here, so that ``import fedsparse`` costs nothing
    from fedsparse.job.earlier import renewed

    return table([folders] if isinstance(folders, str | PathLike) else folders, renewed)


def weights(folder: str | PathLike[str], checkpoint: str = "last", trusted: Sequence[str] = ()) -> Any:
    """Read the model of a checkpoint whole, as a state dict; a file holds only what differs from the built model.

    Args:
        folder: the run folder.
        checkpoint: ``last``, ``best`` by validation, or ``previous``, the last but one.
        trusted: packages whose code the run's configuration may name.

    Returns:
        The network's tensors by its names, on the CPU.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the model is built with other weights now.

    """
    from pathlib import Path  # here, so that ``import fedsparse`` costs nothing

    from fedsparse.job.finished import saved_weights

    return saved_weights(Path(folder), checkpoint, trusted)


def _interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say in one line that Ctrl-C came while a command was still being imported, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print("fedsparse: SIGINT: stopped before the end", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # what Python puts there until it has found the module of ``python -m fedsparse...``
    sys.excepthook = _interrupted
