"""What a run is, in a line: before it begins, from its configuration alone, and over its results."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from fedsparse.job.resume import Job
from fedsparse.job.sweep import short_path

# parts that a heading leaves out
USUAL = {"objective": "none", "exchange": "masked", "aggregation": "weighted_mean", "server": "fedavg"}
WHATEVER_THE_RATIO = ("dense", "from_file")  # mask rules that do not go by sparsity.ratio


def heading(run: Mapping[str, Any], usual: Mapping[str, str | None] = USUAL) -> str:
    """Write what a run is: data, model, partition, mask rule, fraction frozen, parts that are not the usual ones, seed.

    >>> run = {"data": "digits", "model": "mlp", "partition": "iid", "mask_rule": "random", "sparsity": 0.8, "seed": 0}
    >>> heading(run | {"server": "fedadam", "exchange": "masked"})
    'digits, mlp, iid, random 80% frozen, server=fedadam, seed 0'
    """
    how = "pruned" if "compression" in run else "frozen"
    sparse = f" {100 * run['sparsity']:g}% {how}" if run["sparsity"] else ""
    task = f"{run['data']}, {run['model']}, {run['partition']}"
    other = [f", {key}={run[key]}" for key, left_out in usual.items() if run.get(key, left_out) not in (left_out, None)]
    return f"{task}, {run['mask_rule']}{sparse}{''.join(other)}, seed {run['seed']}"


def announcement(job: Job) -> str:
    """Write what is about to run, from the configuration alone: heading with the server, clients, rounds and folder.

    The configuration may still hold values that are refused later, when the parts are built.
    """
    cfg, chosen = job.cfg, dict.fromkeys(("data", "model", "partition", "mask_rule"), "own") | job.choices
    ratio = None if chosen["mask_rule"] in WHATEVER_THE_RATIO else cfg.sparsity.get("ratio")
    sparsity = ratio if isinstance(ratio, int | float) else None
    pruned = {"compression": None} if cfg.sparsity.get("mode") == "prune" else {}
    what = heading({**chosen, **pruned, "sparsity": sparsity, "seed": cfg.seed}, {**USUAL, "server": None})
    clients, rounds = cfg.federation.num_clients, cfg.federation.rounds
    counts = f"{clients} {'client' if clients == 1 else 'clients'}, {rounds} {'round' if rounds == 1 else 'rounds'}"
    return f"{'resumes ' * job.resumed}{what}; {counts}; {short_path(job.folder)}"


def announce(job: Job) -> None:
    """Print what is about to run to standard error, where the rounds are shown."""
    print(f"fedsparse: {announcement(job)}", file=sys.stderr, flush=True)
