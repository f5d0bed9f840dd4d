"""A deployed run on the server: what ``fedsparse.train`` does, with its clients at nodes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsparse.core import files
from fedsparse.core.folder import CONFIG, HYDRA, OVERRIDES
from fedsparse.deploy.compose import Deployed
from fedsparse.deploy.messages import Link
from fedsparse.deploy.remote import join
from fedsparse.job import trust
from fedsparse.job.command import logging_kept
from fedsparse.job.config import check
from fedsparse.job.execute import execute
from fedsparse.job.resume import Job, finished, open_log
from fedsparse.job.summary import print_table
from fedsparse.job.sweep import locked

DEPLOYED = "deployed.yaml"


def serve(link: Link, config: str, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Run a deployed run on the server; returns its summary, with ``folder``.

    Args:
        link: the way to the nodes.
        config: text of the configuration (``compose.compose``).
        folder: the run folder.
        resume: whether it holds a run that was stopped.

    Raises:
        ValueError: one line: the configuration is invalid, clients are missing, or training diverged.

    """
    deployed = Deployed.read(config)
    job = Job(_resolved(deployed), folder, dict(deployed.choices), resumed=resume)
    with logging_kept(), locked(folder):
        _store(deployed, folder)
        done = finished(replace(job, begun=int(job.cfg.federation.rounds))) if resume else None
        if done is not None:
            return done | {"folder": str(folder)}
        open_log(folder)
        check(job.cfg, job.choices)
        summary = execute(job, partial(join, link, deployed))
        print_table(folder, summary)
    return summary


def _resolved(deployed: Deployed) -> DictConfig:
    """Resolve the configuration; who submits it may name code, as on a command line."""
    typed = [override.partition("=")[0].lstrip("+") for override in deployed.overrides]
    cfg = trust.admitted(deployed.config, typed=typed)
    OmegaConf.set_struct(cfg, True)
    return cfg


def _store(deployed: Deployed, folder: Path) -> None:
    """Write the configuration into the run folder, in the files of every run, and as it was deployed."""
    typed = [override for override in deployed.overrides if not override.startswith("deploy.")]
    node = {"runtime": {"choices": dict(deployed.choices)}, "mode": "RUN", "sweep": {"dir": str(folder.parent)}}
    (folder / CONFIG).parent.mkdir(parents=True, exist_ok=True)
    files.write(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(deployed.config))))
    files.write(folder / HYDRA, OmegaConf.to_yaml(OmegaConf.create({"hydra": node})))
    files.write(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(typed)))
    files.write(folder / DEPLOYED, deployed.text())
