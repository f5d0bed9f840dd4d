"""Landscapes of many runs over their rounds: ``python -m fedsparse.studies.landscapes <folder> --rounds 1 3 10 25``.

Of every finished run below the folder: figures of the models, lines from the global model to two clients, curvature and
sharpness after each of these rounds, and surfaces after the last one. Rounds before a run's last need a run with
``trajectory=global``. What was computed before is not computed again; a run that fails is one line, and the others go
on. ``python -m fedsparse.report`` then has a section on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from joblib import Parallel, delayed

from fedsparse.analysis.folders import Run, read_runs
from fedsparse.core.signals import command
from fedsparse.data.files import printable
from fedsparse.job import trust
from fedsparse.job.command import one_line
from fedsparse.job.earlier import renewed
from fedsparse.job.sweep import short_path
from fedsparse.landscape.options import GLOBAL, Options

GRID = 11
CLIENTS = 2  # whose models are drawn beside the global one


def asked(run: Run, rounds: Sequence[int] | None, grid: int = GRID, samples: int | None = None) -> Iterator[Options]:
    """Iterate over the landscapes of a run, one a round.

    Args:
        run: a finished run; with one client, and after round 0, the global model is the only one.
        rounds: numbers of rounds closed; None: the last.
        grid: points along an axis.
        samples: of each split; None: all.

    Raises:
        ValueError: an option that cannot be meant.

    """
    last, clients = int(run.summary["rounds"]), int(run.config["federation.num_clients"])
    for number in sorted({last} if rounds is None else set(rounds)):
        models = [GLOBAL, *range(min(CLIENTS, clients))] if clients > 1 and number else [GLOBAL]
        yield Options(grid=grid, samples=samples, models=models, round=number, surface=number == last, sharpness=True)


def draw(run: Run, options: Sequence[Options], trusted: Sequence[str] = ()) -> int:
    """Draw the landscapes of a run, print a line for each that fails and one for those that do not; count the former.

    Args:
        run: a finished run.
        options: of each landscape.
        trusted: names of packages whose code the run may name.

    """
    from fedsparse.job.execute import quiet  # here, so that a wrong argument is refused without torch
    from fedsparse.landscape.drawing import landscape

    quiet()
    done = list[int | None]()
    for each in options:
        try:
            landscape(run.folder, each, trusted)
            done.append(each.round)
        except Exception as error:  # whatever a round leads to, the others are drawn
            print(
                f"fedsparse: {short_path(run.folder)}, round {each.round}: {one_line(error)}",
                file=sys.stderr,
                flush=True,
            )
    print(printable(f"{short_path(run.folder)}: rounds {' '.join(map(str, done)) or 'none'}"), flush=True)
    return len(options) - len(done)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder, or a folder that holds some at any depth")
    parser.add_argument("--rounds", type=int, nargs="+", metavar="N", help="rounds closed; default: the last of a run")
    parser.add_argument("--grid", type=int, default=GRID, help="points along an axis and a line")
    parser.add_argument("--samples", type=int, help="of each split, at most; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="NAME", help="packages whose code the stored runs may name"
    )
    given = parser.parse_args(arguments)
    try:
        trusted = trust.checked(given.trust)
        runs, problems = read_runs([given.folder], renewed)
        options = [list(asked(run, given.rounds, given.grid, given.samples)) for run in runs]
    except ValueError as error:
        sys.exit(printable(f"fedsparse: {error}"))
    each = partial(draw, trusted=trusted)
    failed = sum(Parallel(n_jobs=given.jobs)(delayed(each)(*pair) for pair in zip(runs, options, strict=True)))
    for problem in problems:
        print(printable(f"left out: {problem.name}: {problem.reason}"))
    if failed:
        sys.exit(f"fedsparse: {failed} landscapes failed, see above; the same command skips what is drawn")


if __name__ == "__main__":
    with command():
        main()
