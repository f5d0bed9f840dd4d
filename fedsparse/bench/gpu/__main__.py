"""``python -m fedsparse.bench.gpu``: exactness, time, memory and waits on one GPU; ``--tiny`` the same on a CPU.

Each check is a JSON object on a line of its own; what fails, or finds no time, says so and stops nothing else.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import fedsparse
from fedsparse.bench.arguments import Parser
from fedsparse.bench.machine import describe
from fedsparse.core.signals import command

if TYPE_CHECKING:
    from fedsparse.bench.gpu.session import Figures, Session

# what a section needs to begin, in seconds at full size
SECTIONS = {"cli": 90, "vit": 60, "small": 60, "bert": 60, "profile": 40, "determinism": 30}
BUDGET = 460.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry the sections out."""
    options = _parse(arguments)
    import torch  # here, so that a command line is read without it

    from fedsparse.bench.gpu.session import Session

    session = Session(options.device, options.tiny, options.budget, options.out)
    if session.tiny or session.device.type == "cpu":
        torch.set_num_threads(1)
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA's libraries start; for determinism
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session.say("here", **_here(session))
        _carry_out(session, options.only)
    session.say("end", failed_checks=len(session.failed))
    if session.failed:
        sys.exit(f"fedsparse: {len(session.failed)} checks failed, see above")


def _carry_out(session: Session, only: Sequence[str]) -> None:
    """Run the sections that are asked for, in their own order."""
    from fedsparse.bench.gpu import command_line, sections  # here, so that --help does not load Lightning

    for name in ("lightning.pytorch", "lightning.fabric"):  # which its import has made talk
        logging.getLogger(name).setLevel(logging.ERROR)
    run = {
        "cli": command_line.command_line,
        "vit": sections.vit,
        "small": sections.small,
        "bert": sections.bert,
        "profile": sections.profile,
        "determinism": sections.determinism,
    }
    for name, needs in SECTIONS.items():
        if name in only:
            session.attempt(name, needs, partial(_section, run[name], session))


def _section(run: Callable[[Session], None], session: Session) -> Figures:
    """Run a section, whose checks have said their figures themselves."""
    run(session)
    return {}


def _here(session: Session) -> Figures:
    """Describe machine and code."""
    import torch

    cuda = session.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(session.device) if cuda else "cpu",
        "tiny": session.tiny,
        "code": str(Path(fedsparse.__file__).parent),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        **describe(torch.get_num_threads()),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and fill in what depends on others."""
    parser = Parser(prog="python -m fedsparse.bench.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU unless --device says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--budget", type=seconds, help=f"seconds; default {BUDGET:.0f}, with --tiny no end")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl, to which lines are added")
    options = parser.parse_args(arguments)
    import torch  # here, so that --help and most mistakes need none

    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        parser.error("--device cuda: torch finds no CUDA device here")
    options.device = torch.device(options.device or ("cuda" if there and not options.tiny else "cpu"))
    options.budget = options.budget or (math.inf if options.tiny else BUDGET)
    try:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


def seconds(text: str) -> float:
    """Read a number of seconds above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


if __name__ == "__main__":
    with command():
        main()
