"""The command line: whole runs on this device and on the CPU, once and again, and which of them end in equal bits.

Shapes: P coordinates of the row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedsparse.bench.gpu.runs import Job, Runs
from fedsparse.bench.gpu.session import Figures, Session
from fedsparse.core.folder import MASK, METRICS, WEIGHTS
from fedsparse.core.rows import read_rows
from fedsparse.core.weights import load_weights
from fedsparse.masks import Mask

COLUMNS = ("train/loss", "val/acc", "test/acc", "seconds")
AT_ONCE = 7  # runs that one GPU and 16 cores carry; their bits do not depend on time


@dataclass(frozen=True)
class Pair:
    """Two runs to compare.

    Attributes:
        name: says what is to be expected.
        runs: their names.

    """

    name: str
    runs: tuple[str, str]


PAIRS = (
    Pair("same command twice, default: bits", ("default", "default_again")),
    Pair("same command twice, conv (cudnn): bits", ("conv", "conv_again")),
    Pair("same command twice, bf16-mixed: bits", ("bf16", "bf16_again")),
    Pair("default on GPU and CPU: close, mask may differ in ties", ("default_cpu", "default")),
    Pair("random mask on GPU and CPU: close", ("random_cpu", "random")),
    Pair("topk with feedback on GPU and CPU: close", ("topk_cpu", "topk")),
    Pair("K=1 and K=10: close", ("random", "k10")),
    Pair("deterministic=true and not: bits", ("random", "deterministic")),
    Pair("bf16-mixed and float32: close", ("random", "bf16")),
    Pair("killed and resumed, or in one go: bits", ("whole", "killed")),
)


def command_line(session: Session) -> None:
    """Make the runs, say which failed, and compare pairs."""
    with tempfile.TemporaryDirectory(prefix="runs") as name:
        folder = Path(name)
        threads, most = (1, 1) if session.tiny else (4, AT_ONCE)
        with Runs(folder, threads, most, session.left) as runs:
            jobs = make_jobs(session.device.type, session.tiny)
            runs.make(jobs)
        for job in jobs:
            say_ended(session, runs, job)
        ended = {name for name, code in runs.codes.items() if code == 0}
        summarise(session, compare(session, folder, ended))


def make_jobs(device: str, tiny: bool) -> list[Job]:
    """List the runs; ``layers``, ``own_topk`` and ``prune`` once mixed devices."""
    small = (
        "model=mlp",
        "federation.cohort=1",
        "federation.rounds=2",
        "calibration.head_steps=2",
        "calibration.batches=1",
    )
    few = small if tiny else ("federation.rounds=4",)
    plain = (*few, "mask_rule=random")
    mean = ("aggregation=coordinate_mean", "aggregation.denominator=participants")
    topk = (*plain, "exchange=topk", "exchange.feedback=1.0", *mean)
    long = (*topk, "server=fedadam", f"federation.rounds={8 if tiny else 24}")
    strict = "trainer.deterministic=true"
    here = {
        "killed": long,
        "whole": long,
        "default": few,
        "default_again": few,
        "random": plain,
        "k10": (*plain, "federation.cohort=10"),
        "conv": (*plain, "model=conv"),
        "conv_again": (*plain, "model=conv"),
        "topk": topk,
        "bf16": (*plain, "trainer.precision=bf16-mixed"),
        "bf16_again": (*plain, "trainer.precision=bf16-mixed"),
        "deterministic": (*plain, strict),
        "half": (*plain, "trainer.precision=16-mixed"),
        "layers": (*plain, "exchange=layers"),
        "own_topk": (*few, "mask.owner=client", "exchange=topk"),
        "prune": (*plain, "sparsity.mode=prune", "sparsity=gradual80", "sparsity.schedule.steps=2"),
    }
    more = {
        "cohort_auto": (*plain, "federation.cohort=auto"),
        "per_client": (*plain, "evaluation=per_client"),
        "deterministic_topk": (*topk, strict),
        "autoflip": ("mask_rule=autoflip", "federation.rounds=2"),
    }
    cpu = {"default_cpu": few, "random_cpu": plain, "topk_cpu": topk}
    on_cpu = [Job(name, "cpu", overrides) for name, overrides in cpu.items()]
    on_device = (here | ({} if tiny else more)).items()
    return [*on_cpu, *(Job(name, device, overrides, name == "killed") for name, overrides in on_device)]


def say_ended(session: Session, runs: Runs, job: Job) -> None:
    """Say of a run that it failed, that it was stopped, or where it was killed."""
    name, code = job.name, runs.codes.get(job.name)
    if code is None:
        session.say(f"cli {name}", skipped="the time that was left did not suffice")
    elif code:
        session.say(f"cli {name}", failed=f"exit status {code}", said=runs.said(name))
    elif job.killed:
        session.say(f"cli {name}", rounds_at_kill=runs.kills.get(name))  # null: it was too fast


def compare(session: Session, folder: Path, ended: Collection[str]) -> dict[str, bool | None]:
    """Say how far apart each pair ended.

    Returns:
        By pair whether the bits are equal; None where a run is missing.

    """
    equal: dict[str, bool | None] = {}
    for pair in PAIRS:
        missing = [name for name in pair.runs if name not in ended]
        if missing:
            session.say(f"cli {pair.name}", skipped=f"no run {', '.join(missing)}")
            found = None
        else:
            found = session.attempt(f"cli {pair.name}", 0, partial(differ, *(folder / name for name in pair.runs)))
        equal[pair.name] = None if found is None else found["equal_bits"]
    return equal


def summarise(session: Session, equal: Mapping[str, bool | None]) -> None:
    """Say in one line how many pairs are equal in bits, and which are not."""
    named = {answer: [name for name, found in equal.items() if found is answer] for answer in (True, False, None)}
    session.say(
        "cli pairs",
        compared=len(named[True]) + len(named[False]),
        equal_bits=len(named[True]),
        not_equal=named[False],
        not_compared=named[None],
    )


def differ(first: Path, second: Path) -> Figures:
    """Compare the models and masks that two runs ended with."""
    (x, m), (y, n) = _ended_with(first), _ended_with(second)
    a, b = (torch.cat([value.double().reshape(-1) for value in net.values()]) for net in (x, y))
    return {
        "equal_bits": x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) and torch.equal(m, n),
        "relative": float((a - b).norm() / a.norm()),
        "largest": float((a - b).abs().max()),
        "mask_jaccard": float((m & n).sum() / (m | n).sum()),
        "last_row": [{key: row[key] for key in COLUMNS if key in row} for row in map(_last_row, (first, second))],
    }


def _ended_with(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Read the model, by the network's names, and the mask (P,) that a run ended with."""
    mask = Mask.load(folder / MASK).tensors
    return load_weights(folder / WEIGHTS), torch.cat([kept.reshape(-1) for kept in mask.values()])


def _last_row(folder: Path) -> dict[str, float]:
    return read_rows(folder / METRICS)[-1]
