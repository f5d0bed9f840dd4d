"""Several processes: each trains other clients of the same round, and all hold the same global row.

The first process leads: it prepares, writes and reports; the others follow. What one of them knows and all need goes
through ``share`` and ``gather``, which in a single process cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a process that ends is noticed at once; one that trains for long is waited for


class CohortStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper: clients differ, so that their gradients must not be averaged."""

    def configure_ddp(self) -> None:
        """Leave the module as it is; the tally of a round is reduced by the aggregation."""


def environment() -> ClusterEnvironment | None:
    """Find what started this process as one of several: torchrun, SLURM, or a leading process; None if nothing did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and SLURMEnvironment().world_size() > 1:
        return SLURMEnvironment()
    return None


def join(found: ClusterEnvironment, store: Any = None) -> None:
    """Meet the other processes: gloo for the host's data, NCCL for what lies on GPUs.

    Args:
        found: which process this is.
        store: where they meet; by default at the address that the environment names.

    """
    rank, size = found.global_rank(), found.world_size()
    if store is None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = found.main_address, str(found.main_port)
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=size, timeout=PATIENCE, store=store)


def joined() -> bool:
    """Whether this process is one of several that have met."""
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """Count the processes that have met."""
    return distributed.get_world_size() if joined() else 1


def process() -> int:
    """Place of this process among them; 0 leads."""
    return distributed.get_rank() if joined() else 0


def share(value: T | None = None) -> T | None:
    """Hand a value of the leading process to all; each returns it."""
    if not joined():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Collect the values of all processes, in their order."""
    if not joined():
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old
