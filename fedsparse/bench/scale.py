"""How time and memory grow: ``python -m fedsparse.bench.scale`` with clients, with what they keep, and with weights.

Each case runs in a process of its own, one client at a time, and is a JSON object on a line of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsparse.bench import processes
from fedsparse.bench.arguments import Parser
from fedsparse.bench.memory import grown
from fedsparse.bench.problems import LR, MOMENTUM
from fedsparse.core.signals import command
from fedsparse.core.space import ParamSpace
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.partition import iid
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import ErrorFeedback
from fedsparse.federation.exchange.sparsifiers import TopK
from fedsparse.federation.federation import Federation
from fedsparse.federation.round import play
from fedsparse.federation.server.sampling import uniform
from fedsparse.federation.stores.store import make_store
from fedsparse.models.vision import mlp
from fedsparse.optim.sgdm import SparseSGDM
from fedsparse.simulation.module import ClientModule

STEPS, BATCH, CLASSES = 4, 10, 10


@dataclass(frozen=True)
class Case:
    """A federation of a size.

    Attributes:
        clients: that hold data, ten samples each.
        taking_part: clients of a round.
        hidden: width of a network of 64, this, this and 10 units; 0: of the small MLP.
        feedback: whether clients send the largest tenth, and keep the rest in a file.
        rounds: that count, after a first one.

    """

    clients: int
    taking_part: int
    hidden: int = 0
    feedback: bool = False
    rounds: int = 3


CASES = {
    "100 of 1,000 clients": Case(1_000, 100),
    "100 of 1,000,000 clients": Case(1_000_000, 100),
    "1,000 of 1,000,000 clients": Case(1_000_000, 1_000),
    "top-k with feedback, 1,000 clients": Case(1_000, 1_000, feedback=True),
    "top-k with feedback, 10,000 clients": Case(10_000, 10_000, feedback=True),
    "1e6 weights": Case(4, 2, hidden=960),
    "1e7 weights": Case(4, 2, hidden=3_120),
    "1e8 weights": Case(4, 2, hidden=9_950, rounds=2),
}


def build(case: Case) -> nn.Module:
    """Build the network."""
    torch.manual_seed(0)
    if not case.hidden:
        return mlp(in_features=64, hidden=128, num_classes=CLASSES)
    layers = nn.Linear(64, case.hidden), nn.ReLU(), nn.Linear(case.hidden, case.hidden), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(case.hidden, CLASSES))


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Play rounds: seconds and bytes.

    Returns:
        ``dealt_s`` to deal samples to clients, ``round_s`` and ``client_ms``, the median of rounds, ``row_mb`` of the
        global row, ``peak_mb`` by which memory grew over data and network, and ``kept_mb`` of what clients keep.

    """
    g = torch.Generator().manual_seed(0)
    samples = max(case.clients, 64) * 10
    x = torch.randint(0, 2, (samples, 1, 8, 8), generator=g, dtype=torch.uint8)
    y = torch.randint(CLASSES, (samples,), generator=g)
    began = time.perf_counter()
    parts = iid(y.numpy(), case.clients, 0)
    dealt = time.perf_counter() - began
    sample = partial(uniform, eligible=range(case.clients), count=case.taking_part, seed=0)
    plan = RoundPlan(parts, LocalWork(BATCH, STEPS), sample)
    few = Split(x[:CLASSES], y[:CLASSES])
    data = FederatedDataModule(Dataset(Split(x, y), few, few, classes=CLASSES, name="scale"), plan)
    net = build(case)
    times, peak = grown(partial(_rounds, case, net, data, folder))
    space = ParamSpace.of(net)
    kept = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    return {
        "weights": space.size,
        "dealt_s": round(dealt, 2),
        "round_s": round(statistics.median(times), 3),
        "client_ms": round(1e3 * statistics.median(times) / case.taking_part, 3),
        "row_mb": round(4 * space.size / 1e6, 1),
        "peak_mb": None if peak is None else round(peak / 1e6, 1),
        "kept_mb": round(kept / 1e6, 1),
    }


def _rounds(case: Case, net: nn.Module, data: FederatedDataModule, folder: Path) -> list[float]:
    """Play the rounds: seconds of those that count."""
    space = ParamSpace.of(net)
    trained = torch.ones(space.size, dtype=torch.bool)
    optimizer = partial(SparseSGDM, lr=LR, momentum=MOMENTUM)
    clients = ClientModule(net, space, trained, optimizer, inputs=_scaled).form(data.fetch)
    exchange = Exchange(trained, space.local, space=space)
    if case.feedback:
        feedback = {"feedback": ErrorFeedback()}
        exchange = Exchange(trained, space.local, rule=TopK(fraction=0.1), filters=feedback, space=space)
        exchange.keep_in(lambda name: make_store("file", folder / name))
    federation, times = Federation(clients, exchange), list[float]()
    for number in range(case.rounds + 1):
        began = time.perf_counter()
        play(federation, clients, data.plan.cohorts(number), number)
        times.append(time.perf_counter() - began)
    return times[1:]


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x.float()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases, or the one that a process of its own is for."""
    parser = Parser(prog="python -m fedsparse.bench.scale", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--here", action="store_true", help="in this process, one case")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.only:
        if options.here:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps({"case": name, **measure(CASES[name], Path(folder))}), flush=True)
        else:
            own = ["--here", "--only", name]
            print(
                json.dumps(processes.figures(sys.executable, "fedsparse.bench.scale", own, options.threads)), flush=True
            )


if __name__ == "__main__":
    with command():
        main()
