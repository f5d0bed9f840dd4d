"""How several processes of one run meet, and what Lightning does with them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

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
