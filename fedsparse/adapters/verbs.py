"""What the verbs of ``python -m fedsparse.adapters`` do with the models that a run keeps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial

from fedsparse.adapters.answers import answers
from fedsparse.adapters.exporting import export, merge
from fedsparse.adapters.inventory import listing
from fedsparse.adapters.kept import Kept, Model, Moment
from fedsparse.adapters.matrix_plot import matrix_figure
from fedsparse.adapters.measure import matrix
from fedsparse.adapters.table import print_answers, print_export, print_listing, print_matrix
from fedsparse.core import files
from fedsparse.core.folder import MATRIX, MATRIX_PICTURE
from fedsparse.job.prepare import picture


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


VERBS: Mapping[str, Callable[[Kept, argparse.Namespace], None]] = {
    "list": list_adapters,
    "export": export_adapters,
    "merge": merge_adapter,
    "evaluate": evaluate_adapters,
    "answer": answer,
}
