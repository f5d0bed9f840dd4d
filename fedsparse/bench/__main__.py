"""``python -m fedsparse.bench``: fedsparse and the peers that are installed beside a hand-written loop, in pairs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsparse.bench import processes
from fedsparse.bench.arguments import MODELS, Parser, positive
from fedsparse.bench.machine import describe, load
from fedsparse.bench.peers import PEERS
from fedsparse.core import files
from fedsparse.core.signals import command

if TYPE_CHECKING:
    from fedsparse.bench.problems import Problem
    from fedsparse.bench.rows import Row

HINT = "Peers are not installed here: `make bench-peers` makes their environments, and then they are measured too."


class Figures:
    """Rows so far, and the file that always holds them.

    Args:
        machine: facts about it.
        path: of the file, or None.

    """

    def __init__(self, machine: Mapping[str, Any], path: Path | None) -> None:
        self.machine, self.path = machine, path
        self.rows: list[Row] = []
        self._save()

    def add(self, row: Row) -> None:
        """Keep a row and say so."""
        self.rows.append(row)
        self._save()
        found = "; ".join(filter(None, ["failed" if row.failed else f"{row.ratio:.2f}", row.note]))
        where = f"K = {row.cohort}, {row.setting}" if row.setting else row.version
        print(f"{row.model}, {row.runner} ({where}): {found}", file=sys.stderr, flush=True)

    def _save(self) -> None:
        if self.path:
            held = {"machine": {**self.machine, "load_end": load()}, "rows": [asdict(row) for row in self.rows]}
            files.write(self.path, json.dumps(held, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None, problems: Mapping[str, Problem] | None = None) -> None:
    """Measure, print, and write JSON if asked to; or print the tables of a JSON file.

    Args:
        arguments: of the command line.
        problems: by name, what may be measured; by default the models of docs/studies/speed.md.

    """
    options = _parse(arguments, MODELS if problems is None else tuple(problems))
    from fedsparse.bench import tables  # here, so that a command line is read without torch
    from fedsparse.bench.problems import PROBLEMS

    try:
        if options.table:
            print("\n\n".join(table.markdown() for table in tables.tables(tables.read(options.table))))
        else:
            _run(options, _asked(options, PROBLEMS if problems is None else problems))
    except (ValueError, OSError) as error:
        sys.exit(f"fedsparse: {error}")


def _run(options: argparse.Namespace, problems: Sequence[Problem]) -> None:
    import torch

    from fedsparse.bench import tables
    from fedsparse.bench.collect import Collector  # here, so that --table does not load Lightning
    from fedsparse.bench.problems import CLIENTS, STEPS

    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    figures = Figures(describe(options.threads), options.json)
    peers = _peers(options)
    for row in Collector(options.threads, options.memory, peers, bool(options.models)).rows(problems):
        figures.add(row)
    print(f"{CLIENTS} clients x {STEPS} local steps a round")
    for table in tables.tables(figures.rows):
        table.show()
    if not peers and options.peers is None:
        print(HINT)
    if failed := sum(row.failed for row in figures.rows):
        sys.exit(f"fedsparse: {failed} of {len(figures.rows)} rows failed, see above")


def _parse(arguments: Sequence[str] | None, models: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m fedsparse.bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=models, help="default: all")
    parser.add_argument("--cohort", nargs="+", type=positive, help="bounds of the clients that train together")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="default: those installed, on models they run")
    parser.add_argument("--environments", type=Path, default=processes.ENVIRONMENTS, help="folder of the peers'")
    parser.add_argument("--pairs", type=positive, help="pairs that count, instead of the model's own number")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--table", type=Path, help="print the tables of such a file, and measure nothing")
    return parser.parse_args(arguments)


def _asked(options: argparse.Namespace, problems: Mapping[str, Problem]) -> list[Problem]:
    """Models that are asked for, with the pairs and cohorts that are."""
    asked = {"pairs": options.pairs, "cohorts": options.cohort and tuple(options.cohort)}
    changes = {name: value for name, value in asked.items() if value}
    return [replace(problems[name], **changes) for name in options.models or problems]


def _peers(options: argparse.Namespace) -> dict[str, Path]:
    """Peers that are asked for, else those installed: name -> Python."""
    found = processes.installed(options.environments)
    if missing := [name for name in options.peers or () if name not in found]:
        raise ValueError(f"{', '.join(missing)} not installed in {options.environments}: `make bench-peers`")
    return found if options.peers is None else {name: found[name] for name in options.peers}


if __name__ == "__main__":
    with command():
        main()
