"""Train: ``python -m fedsparse.train [group=option] [key=value]``, or ``resume=<run folder>``."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from fedsparse.core.launch import launched
from fedsparse.core.monitor import monitor_of
from fedsparse.job.command import arrange, logging_kept, on_command_line
from fedsparse.job.runs import execute_hydra, resume, resume_folder, run
from fedsparse.job.shipped import conf_dir

__all__ = ["main", "run"]


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> float | None:
    summary = execute_hydra(cfg)
    return summary.get(monitor_of(summary))  # the objective of Optuna's sweeper


def main() -> None:
    """Entry point of the command line."""
    on_command_line(_one_of_several if launched() else _train)


def _train() -> None:
    arrange()
    folder = resume_folder(sys.argv[1:])
    if folder is not None:
        resume(folder, [a for a in sys.argv[1:] if not a.startswith("resume=")])
    else:
        with logging_kept():
            _hydra_main()


def _one_of_several() -> None:
    """Train in a process that torchrun, SLURM or a leading process started; the first one reads the command line."""
    from fedsparse.core import parallel  # here, so that a command line alone is read without torch
    from fedsparse.job.execute import follow
    from fedsparse.simulation import processes

    if processes.join() and parallel.process() > 0:
        return processes.serve(follow)
    _train()
    parallel.share(None)  # ends the other processes
    return processes.leave()


if __name__ == "__main__":
    main()
