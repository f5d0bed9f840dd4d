"""What a runner's own process does: ``python -m fedsparse.bench.alone loop mlp`` prints its memory as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedsparse.bench.compare import in_pairs
from fedsparse.bench.loop import SGDS
from fedsparse.bench.memory import grown, warm
from fedsparse.bench.pairs import Feed, Train
from fedsparse.bench.problems import PROBLEMS, Task

ROUNDS = 3  # enough for a peak: each round asks for what the one before gave back
RUNNERS = {"loop": "fedsparse.bench.loop", "fedsparse": "fedsparse.bench.federated"}


def main(train: Train, arguments: Sequence[str], version: str = "") -> None:
    """Print the figures of a runner as the last line of standard output.

    Args:
        train: the runner.
        arguments: of the command line.
        version: of the runner.

    """
    parser = argparse.ArgumentParser(description="One runner in a process of its own; prints JSON.")
    parser.add_argument("model", choices=list(PROBLEMS))
    parser.add_argument("--cohort", type=int, default=1, help="clients that train together")
    parser.add_argument("--pairs", type=int, help="time so many rounds, each beside one of the hand-written loop")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(json.dumps(_figures(train, options) | {"version": version}), flush=True)


def _figures(train: Train, options: argparse.Namespace) -> dict[str, Any]:
    """Times in pairs if asked for, else memory."""
    problem = PROBLEMS[options.model]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # what a runner leaves behind goes with it
        try:
            if options.pairs:
                return in_pairs(train, replace(problem, pairs=options.pairs, warmup=options.warmup), options.cohort)
            return memory(train, Task(problem, ROUNDS, options.cohort))
        finally:
            os.chdir("/")


def memory(train: Train, task: Task) -> dict[str, int | None]:
    """Train for a few rounds -> ``memory``: growth of the peak over training, in bytes, other processes included."""
    warm(task)
    feed = Feed(task.batches, SGDS[0])
    trained, own = grown(lambda: train(task, feed))
    return {"memory": None if own is None else own + trained.elsewhere}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in RUNNERS:
        sys.exit(f"fedsparse: the runner is one of {', '.join(RUNNERS)}")
    main(importlib.import_module(RUNNERS[sys.argv[1]]).train, sys.argv[2:])
