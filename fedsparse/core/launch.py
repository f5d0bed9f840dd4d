"""Whether another program started this process as one of several; read from the environment, without torch."""

from __future__ import annotations

import os


def torchrun() -> bool:
    """Whether torchrun, or a leading process in its manner, started this one beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def launched() -> bool:
    """Whether this process may be one of several: under SLURM, Lightning tells an interactive shell from srun."""
    return torchrun() or "SLURM_NTASKS" in os.environ
