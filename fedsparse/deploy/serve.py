"""A deployed run on the server: what ``fedsparse.train`` does, with its clients at nodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fedsparse.deploy.meeting import join
from fedsparse.deploy.messages import Link
from fedsparse.job.command import logging_kept
from fedsparse.job.config import check
from fedsparse.job.deployed import Deployed
from fedsparse.job.execute import execute
from fedsparse.job.resume import finished, open_log
from fedsparse.job.summary import print_table
from fedsparse.job.sweep import locked


def serve(link: Link, config: str, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Run a deployed run on the server; returns its summary, with ``folder``.

    Args:
        link: the way to the nodes.
        config: text of the configuration (``job.deployed.compose``).
        folder: the run folder.
        resume: whether it holds a run that was stopped.

    Raises:
        ValueError: one line: the configuration is invalid, clients are missing, or training diverged.

    """
    deployed = Deployed.read(config)
    job = deployed.job(folder, resume)
    with logging_kept(), locked(folder):
        deployed.store(folder)
        if resume and (done := finished(job)) is not None:
            return done | {"folder": str(folder)}
        open_log(folder)
        check(job.cfg, job.choices)
        summary = execute(job, partial(join, link, deployed))
        print_table(folder, summary)
    return summary
