"""Adapters of a finished run: ``python -m fedsparse.adapters <run folder> list|export|merge|evaluate|answer``.

list prints adapters by layer, departments, clients, kept rounds and sizes. export writes the adapters of departments,
and those that clients keep, in PEFT's format, with adapters.json and evaluation.json. merge writes a plain model.
evaluate prints the figures of every adapter on every test part. answer prints answers to a prompt, side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fedsparse.adapters.answers import MOST, answers
from fedsparse.adapters.exporting import export, merge
from fedsparse.adapters.inventory import listing
from fedsparse.adapters.kept import Kept, Model, Moment
from fedsparse.adapters.matrix_plot import matrix_figure
from fedsparse.adapters.measure import matrix
from fedsparse.adapters.table import print_answers, print_export, print_listing, print_matrix
from fedsparse.core import files
from fedsparse.core.folder import MATRIX, MATRIX_PICTURE
from fedsparse.job import trust
from fedsparse.job.command import on_command_line
from fedsparse.job.execute import quiet
from fedsparse.job.prepare import picture
from fedsparse.job.sweep import locked


def list_adapters(kept: Kept, options: argparse.Namespace) -> None:
    """Print what the run keeps."""
    found = listing(kept)
    print(json.dumps(found, indent=2)) if options.json else print_listing(found)


def export_adapters(kept: Kept, options: argparse.Namespace) -> None:
    """Write adapters in PEFT's format."""
    print_export(*export(kept, options.out, options.rounds, options.departments, options.clients))


def merge_adapter(kept: Kept, options: argparse.Namespace) -> None:
    """Write the plain model of one department or client.

    Raises:
        ValueError: several are meant.

    """
    moment = kept.at(options.round)
    chosen = _named(moment, options)
    if len(chosen) != 1:
        raise ValueError(f"merge writes one model: choose one of {', '.join(model.name for model in chosen)}")
    print(merge(kept, moment, chosen[0], options.out))


def evaluate_adapters(kept: Kept, options: argparse.Namespace) -> None:
    """Print and write the matrix of adapters and test parts."""
    moment = kept.at(options.round)
    figures = matrix(kept, moment, moment.chosen(options.departments, options.clients))
    folder = kept.folder if options.out is None else options.out
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / MATRIX, json.dumps(figures, indent=2) + "\n")
    picture(folder / MATRIX_PICTURE, partial(matrix_figure, figures))
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print_matrix(figures)
        print(folder / MATRIX_PICTURE)


def answer(kept: Kept, options: argparse.Namespace) -> None:
    """Print the models' answers to a prompt."""
    moment = kept.at(options.round)
    print_answers(list(answers(kept, moment, _named(moment, options), options.prompt, options.tokens)))


def _named(moment: Moment, options: argparse.Namespace) -> list[Model]:
    """Choose the models that are named; the departments' if none is."""
    named = options.departments is not None or options.clients is not None
    return moment.chosen(options.departments, options.clients) if named else moment.departments


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
    _verb(verbs, "list", list_adapters, "layers, departments, clients, rounds, sizes", "json")
    _verb(verbs, "export", export_adapters, "write adapters in PEFT's format", "out", "rounds", "models")
    _verb(verbs, "merge", merge_adapter, "write a plain model with an adapter merged", "out", "round", "models")
    _verb(verbs, "evaluate", evaluate_adapters, "every adapter on every test part", "out", "round", "models", "json")
    asked = _verb(verbs, "answer", answer, "answers of a language model's adapters", "round", "models")
    asked.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    asked.add_argument("--tokens", type=int, default=MOST, metavar="N", help=f"new tokens at most ({MOST})")
    return made


def _verb(verbs: Any, name: str, body: Callable[..., None], words: str, *options: str) -> Any:
    """Add a verb with some of the options that verbs share."""
    made = verbs.add_parser(name, help=words, description=words)
    made.set_defaults(body=body)
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
    quiet()
    kept = Kept.of(options.folder, trust.checked(options.trust))
    with locked(options.folder):
        options.body(kept, options)


def main() -> None:
    """Entry point of the command line."""
    on_command_line(partial(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
