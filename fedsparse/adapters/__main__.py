"""Adapters of a finished run: ``python -m fedsparse.adapters <run folder> list|export|merge|evaluate|answer``.

list prints adapters by layer, departments, clients, kept rounds and sizes. export writes the adapters of departments,
and those that clients keep, in PEFT's format, with adapters.json and evaluation.json. merge writes a plain model.
evaluate prints the figures of every adapter on every test part. answer prints answers to a prompt, side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fedsparse.adapters.limits import MOST
from fedsparse.job import trust
from fedsparse.job.command import on_command_line
from fedsparse.job.sweep import locked


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the refusal.

        Raises:
            ValueError: always.

        """
        raise ValueError(f"{message}; python -m fedsparse.adapters --help lists what there is")


def parser() -> Parser:
    """Build the parser of all verbs."""
    made = Parser(
        prog="python -m fedsparse.adapters", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("folder", type=Path, help="run folder")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="list|export|merge|evaluate|answer")
    _verb(verbs, "list", "layers, departments, clients, rounds, sizes", "json")
    _verb(verbs, "export", "write adapters in PEFT's format", "out", "rounds", "models")
    _verb(verbs, "merge", "write a plain model with an adapter merged", "out", "round", "models")
    _verb(verbs, "evaluate", "every adapter on every test part", "out", "round", "models", "json")
    asked = _verb(verbs, "answer", "answers of a language model's adapters", "round", "models")
    asked.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    asked.add_argument("--tokens", type=int, default=MOST, metavar="N", help=f"new tokens at most ({MOST})")
    return made


def _verb(verbs: Any, name: str, words: str, *options: str) -> Any:
    """Add a verb with some of the options that verbs share."""
    made = verbs.add_parser(name, help=words, description=words)
    made.add_argument("--trust", nargs="+", default=[], metavar="NAME", help="packages whose code the run may name")
    if "out" in options:
        made.add_argument("--out", type=Path, metavar="DIR", help="folder to write, instead of one in the run folder")
    if "round" in options:
        made.add_argument("--round", type=int, metavar="N", help="rounds closed; the last by default")
    if "rounds" in options:
        made.add_argument("--rounds", type=int, nargs="+", default=[], metavar="N", help="rounds of clients' adapters")
    if "models" in options:
        made.add_argument("--departments", nargs="+", metavar="NAME", help="some departments")
        made.add_argument("--clients", nargs="+", type=int, metavar="ID", help="some clients that keep a model")
    if "json" in options:
        made.add_argument("--json", action="store_true", help="print JSON")
    return made


def check_peft() -> None:
    """Refuse to go on without PEFT.

    Raises:
        ValueError: it is not installed.

    """
    if find_spec("peft") is None:
        raise ValueError("adapters need PEFT: pip install 'fedsparse[lora]'")


def run(arguments: Sequence[str]) -> None:
    """Carry a command out.

    Raises:
        ValueError: one line that says what is wrong.

    """
    options = parser().parse_args(arguments)
    check_peft()
    trusted = trust.checked(options.trust)
    from fedsparse.adapters.kept import Kept  # here, so that a wrong argument is refused without torch
    from fedsparse.adapters.verbs import VERBS
    from fedsparse.job.execute import quiet

    quiet()
    kept = Kept.of(options.folder, trusted)
    with locked(options.folder):
        VERBS[options.verb](kept, options)


def main() -> None:
    """Entry point of the command line."""
    on_command_line(partial(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
