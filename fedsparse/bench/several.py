"""How much faster two processes of one thread are than one: ``python -m fedsparse.bench.several [--pairs 3]``.

Whole runs of ``fedsparse.train`` on a ViT-S/16 with random weights and images, one process and two in turn, so that the
machine's drift meets both. The first round of a run does not count: torch prepares its kernels in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsparse.bench.arguments import positive
from fedsparse.bench.machine import load
from fedsparse.bench.problems import CLIENTS, STEPS
from fedsparse.core.folder import METRICS
from fedsparse.core.rows import read_rows

BATCH, SIDE, CLASSES = 2, 224, 10


def write_images(folder: Path) -> None:
    """Write random images for ten clients, and a few to validate and test."""
    rng = np.random.default_rng(0)
    for part, count in (("train", CLIENTS * STEPS * BATCH), ("val", CLASSES), ("test", CLASSES)):
        x = rng.standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)
        np.savez(folder / f"{part}.npz", x=x, y=np.arange(count) % CLASSES)


def seconds(data: Path, folder: Path, processes: int, rounds: int) -> float:
    """Train in so many processes of one thread -> median seconds of a round after the first."""
    options = {
        "data": "arrays", "data.root": data, "data.batch_size": BATCH,
        "model": "timm", "model.name": "vit_small_patch16_224", "model.pretrained": "false",
        "mask_rule": "dense", "head.init": "random", "sampling": "everyone", "pictures": "false", "logger": "csv",
        "federation.num_clients": CLIENTS, "federation.clients_per_round": CLIENTS, "federation.local_steps": STEPS,
        "federation.rounds": rounds, "federation.eval_every": 100, "federation.checkpoint_every": 100,
        "trainer.accelerator": "cpu", "trainer.devices": processes, "hydra.run.dir": folder,
    }  # fmt: skip
    command = [sys.executable, "-m", "fedsparse.train", *(f"{key}={value}" for key, value in options.items())]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    timed = [row["seconds"] for row in read_rows(folder / METRICS)]
    return statistics.median(timed[1:-1])  # the last round is evaluated too


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure pairs and print them."""
    parser = argparse.ArgumentParser(prog="python -m fedsparse.bench.several", description=__doc__)
    parser.add_argument("--pairs", type=positive, default=3)
    parser.add_argument("--rounds", type=positive, default=4, help="of a run; all but the first and last count")
    options = parser.parse_args(arguments)
    if options.rounds < 3:
        sys.exit(f"fedsparse: --rounds {options.rounds} leaves none to measure; give at least 3")
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        for pair in range(options.pairs):
            one, two = (seconds(folder, folder / f"{pair}-{count}", count, options.rounds) for count in (1, 2))
            ratios.append(one / two)
            print(f"a round: {one:.1f} s in one process, {two:.1f} s in two: {one / two:.2f} x as fast; load {load()}")
    print(f"median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
