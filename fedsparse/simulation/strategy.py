"""The process group of a run, and Lightning's strategy for it."""

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

from fedsparse.core import launch

PATIENCE = timedelta(days=7)  # longest wait for a process that trains; one that ends is noticed at once


class CohortStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper, which would average the gradients of different clients."""

    def configure_ddp(self) -> None:
        """Do nothing: the aggregation reduces the tally of a round."""


def environment() -> ClusterEnvironment | None:
    """Detect the launcher of several processes: torchrun, with its variables, or SLURM; else None."""
    if launch.torchrun():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and SLURMEnvironment().world_size() > 1:
        return SLURMEnvironment()
    return None


def join(found: ClusterEnvironment, store: Any = None) -> None:
    """Initialise the process group: gloo for tensors on the host, NCCL for those on GPUs.

    Args:
        found: gives rank, number of processes and address.
        store: by which they meet; by default at the environment's address.

    """
    rank, size = found.global_rank(), found.world_size()
    if store is None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = found.main_address, str(found.main_port)
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=size, timeout=PATIENCE, store=store)
