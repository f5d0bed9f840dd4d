"""What training fewer weights saves, on a ViT-S/16: ``python -m fedsparse.bench.savings``.

Time of a local step and of the optimizer alone, as ratios in interleaved pairs, and memory, each mask in a process of
its own. Masks are random: where they lie does not matter to time and memory, only how many train and in what pieces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedsparse.bench.memory import forget_peak, resident
from fedsparse.bench.problems import vit_small
from fedsparse.core import files
from fedsparse.core.signals import command
from fedsparse.core.space import ParamSpace
from fedsparse.core.timing import interleaved
from fedsparse.federation.client.drift import GradientCorrection
from fedsparse.federation.client.training import Clients
from fedsparse.masks import Sparsity
from fedsparse.masks.select import select
from fedsparse.optim.sgdm import SparseSGDM
from fedsparse.simulation.module import ClientModule

MASKS = {
    "dense": (0.0, "coordinate"),
    "coordinate, 0.8": (0.8, "coordinate"),
    "output, 0.8": (0.8, "output"),
    "coordinate, 0.9": (0.9, "coordinate"),
    "output, 0.9": (0.9, "output"),
}
CLASSES, LR, MOMENTUM = 100, 0.01, 0.9


@dataclass(frozen=True)
class Saving:
    """One mask beside dense training; ratios are medians over the pairs.

    Attributes:
        mask: unit and ratio.
        step: local step (forward, backward, optimizer) over the dense one.
        step_min: least ratio.
        step_max: greatest ratio.
        over_fused: optimizer step over torch's fused SGD on all weights.
        over_default: the same over torch's default SGD.
        state: bytes of momentum and index for each of the model's weights.
        memory: growth of resident memory by a model in training, one sample a step, over that of dense training.

    """

    mask: str
    step: float
    step_min: float
    step_max: float
    over_fused: float
    over_default: float
    state: float
    memory: float


def build_net() -> nn.Module:
    """Build the published model, every time with the same random weights."""
    torch.manual_seed(0)
    return vit_small(CLASSES)


def client(name: str) -> Clients:
    """Build a single client with one of ``MASKS``, ready for its local steps."""
    net = build_net()
    space, (ratio, unit) = ParamSpace.of(net), MASKS[name]
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(0))
    mask = select(scores, space, Sparsity(ratio, unit=unit, always_train="head.*"), largest=True)
    return ClientModule(net, space, mask, partial(SparseSGDM, lr=LR, momentum=MOMENTUM)).form()


def batch(samples: int) -> tuple[Tensor, Tensor]:
    """Draw images of the published size, and labels."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 224, 224, generator=g), torch.randint(CLASSES, (samples,), generator=g)


def torch_sgd(fused: bool) -> torch.optim.SGD:
    """Build torch's SGD on all weights, with gradients."""
    parameters = list(build_net().parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, **({"fused": True} if fused else {}))


def state_bytes(clients: Clients) -> int:
    """Count the bytes of momentum and index after a step."""
    momentum = [state["momentum_buffer"].nbytes for state in clients.optimizer.state.values()]
    return sum(momentum) + clients.optimizer.index_bytes


def grown(name: str, samples: int) -> int:
    """Measure by how many bytes a process grows over three local steps, building the client included."""
    code = f"from fedsparse.bench.savings import print_growth; print_growth({name!r}, {samples})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_growth(name: str, samples: int) -> None:
    """Run three steps and print the peak of resident memory less what it was before there was a model."""
    torch.set_num_threads(1)
    x, y = batch(samples)
    before = resident("VmRSS")
    clients = client(name)
    forget_peak()  # choosing the mask had its own
    for _ in range(3):
        clients.step(x, y, [len(y)], GradientCorrection())
    print(resident("VmHWM") - before)


def measure(pairs: int, samples: int) -> list[Saving]:
    """Measure all masks."""
    (x, y), clients = batch(samples), {name: client(name) for name in MASKS}
    steps = interleaved({n: partial(m.step, x, y, [len(y)], GradientCorrection()) for n, m in clients.items()}, pairs)
    updates = {n: m.optimizer.update for n, m in clients.items()}
    for formed in clients.values():  # a step clears its gradients; any will do here
        for view in formed.rows.views:
            view.grad = torch.full_like(view, 1e-6)
    alone = interleaved({**updates, "fused": torch_sgd(True).step, "default": torch_sgd(False).step}, 5 * pairs)
    memory = {name: grown(name, 1) for name in MASKS}
    return [
        Saving(
            name,
            *_spread(steps[name], steps["dense"]),
            _spread(alone[name], alone["fused"])[0],
            _spread(alone[name], alone["default"])[0],
            state_bytes(formed) / formed.space.size,
            memory[name] / memory["dense"],
        )
        for name, formed in clients.items()
    ]


def _spread(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest ratio over the pairs."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def print_savings(savings: Sequence[Saving]) -> None:
    """Show a table."""
    heads = ("mask", "step", "spread", "optimizer / fused", "/ default", "state, bytes a weight", "memory")
    table = Table(*heads, title="ViT-S/16, ratios to dense training or to torch's SGD", title_justify="left")
    for s in savings:
        figures = (f"{v:.2f}" for v in (s.over_fused, s.over_default, s.state, s.memory))
        table.add_row(s.mask, f"{s.step:.2f}", f"{s.step_min:.2f}-{s.step_max:.2f}", *figures)
    console = Console()
    console.print(table, width=max(110, console.width))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs that count")
    parser.add_argument("--samples", type=int, default=8, help="samples of a local step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    savings = measure(options.pairs, options.samples)
    print_savings(savings)
    if options.json:
        files.write(options.json, json.dumps([asdict(s) for s in savings], indent=2) + "\n")


if __name__ == "__main__":
    with command():
        main()
