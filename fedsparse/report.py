"""The report of finished runs: ``python -m fedsparse.report <run or sweep folder> ... [--out DIR]``.

It reads only run folders, and prints tables; with ``--out`` it writes report.md, report.html (one self-contained page),
the figures as PNG, and every table as CSV and LaTeX into ``tables/``. With ``--save`` it writes what it read into one
file, a line for each run, which it reads as it reads a folder. Equal folders give equal bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedsparse.analysis.files import short
from fedsparse.analysis.folders import Problem, Run, read_runs, save
from fedsparse.analysis.page import (
    Picture,
    Section,
    Table,
    csv_table,
    filled,
    latex_table,
    markdown,
    page,
    png,
    tables_of,
)
from fedsparse.core import files
from fedsparse.core.signals import command
from fedsparse.job.earlier import renewed

_TITLE, PAGE, TABLES = "fedsparse report", "report.html", "tables"


def pixels_accuracy() -> float:
    """Compute the test accuracy of a logistic regression on the pixels of the digits, a reference on the same split."""
    from sklearn.linear_model import LogisticRegression

    from fedsparse.data.datasets import digits

    data = digits()
    model = LogisticRegression(max_iter=5000).fit(data.train.held.flatten(1).numpy(), data.train.y.numpy())
    return float(model.score(data.test.held.flatten(1).numpy(), data.test.y.numpy()))


def sections(folders: Sequence[Path], target: float = 0.95, reach: float | None = None) -> list[Section]:
    """Read run folders, and build the sections of a report.

    Args:
        folders: run folders, folders above them at any depth, or archives.
        target: fraction of the best dense test accuracy, to which rounds are counted.
        reach: validation accuracy to which rounds of all rows are counted too; None: none.

    Raises:
        ValueError: there is no finished run.

    """
    found, problems = read_runs(folders, renewed)
    try:
        return _sections(found, problems, target, reach)
    except Exception:  # of a damaged folder, which is then listed as a problem
        bad = [Problem(run.name, why) for run in found if (why := _unshown(run, target, reach))]
        kept = [run for run in found if run.name not in {problem.name for problem in bad}]
        if not bad or not kept:
            raise
        return _sections(kept, [*problems, *bad], target, reach)


def _unshown(run: Run, target: float, reach: float | None) -> str:
    """Describe why a report of this run alone fails; empty if it does not."""
    try:
        _sections([run], [], target, reach)
    except Exception as error:
        return short(f"its figures cannot be shown ({type(error).__name__}: {' '.join(str(error).split())})")
    return ""


def _sections(found: Sequence[Run], problems: Sequence[Problem], target: float, reach: float | None) -> list[Section]:
    """Build the sections of a report."""
    from fedsparse.analysis import convergence, equal_steps, exchange_table, landscapes_table, overlap, pareto, tables
    from fedsparse.analysis.table import once, rows  # here, so that --help imports neither torch nor matplotlib

    runs, repeated, apart = once(found)
    table = rows(runs)
    known = [row for row in table if not row.exchange]  # curves of sparse exchanges have pictures of their own
    overlaps, unread = overlap.section(table)
    landscapes, torn = landscapes_table.sections(table, runs)
    parts = [
        tables.overview(table),
        *tables.own_models(table),
        tables.by_partition(table),
        tables.by_sparsity(table),
        tables.clients(table),
        pareto.section(table),
        convergence.section(known),
        *exchange_table.section(table),
        *equal_steps.section(table),
        convergence.target_section(table, target),
        *([] if reach is None else [convergence.reach_section(table, reach)]),
        *overlaps,
        *overlap.within(table),
        *landscapes,
        *tables.scaled(runs),
    ]
    left_out = tables.missing(sorted([*problems, *apart, *unread, *torn]), repeated)
    return [*(part for part in map(filled, parts) if part.blocks), *left_out]


def write(parts: Sequence[Section], folder: Path) -> None:
    """Write report.md, report.html, the figures and the tables into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [block for part in parts for block in part.blocks if isinstance(block, Picture)]
    drawn = {picture.name: data for picture in pictures if (data := _drawn(picture))}
    parts = [
        replace(part, blocks=[b for b in part.blocks if not isinstance(b, Picture) or b.name in drawn])
        for part in parts
    ]
    for name, data in drawn.items():
        files.write(folder / f"{name}.png", data)
    (folder / TABLES).mkdir(exist_ok=True)
    for name, table in tables_of(parts).items():
        files.write(folder / TABLES / f"{name}.csv", csv_table(table))
        files.write(folder / TABLES / f"{name}.tex", latex_table(table))
    files.write(folder / "report.md", markdown(_TITLE, parts))
    files.write(folder / PAGE, page(_TITLE, parts, drawn))


def _there(block: Table | Picture, drawn: Mapping[str, bytes]) -> bool:
    return isinstance(block, Table) or block.name in drawn


def _drawn(picture: Picture) -> bytes | None:
    """Draw a figure as PNG; None if that fails, after a warning."""
    try:
        return png(picture.draw())
    except Exception as error:
        message = short(" ".join(str(error).split()))
        print(
            f"fedsparse: warning: {picture.name}.png is left out ({type(error).__name__}: {message})", file=sys.stderr
        )
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, and write it with ``--out``."""
    options = _parser().parse_args(arguments)
    failed = 0
    if options.scale:
        from fedsparse.job import trust  # here: only --scale imports what builds models
        from fedsparse.landscape import scale

        failed = scale.measure(options.folders, trust.checked(options.trust))
    try:
        parts = sections(options.folders, options.target, options.reach)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        if options.save:
            save(options.folders, options.save, renewed)
    except (ValueError, OSError) as error:
        sys.exit(f"fedsparse: {error}")
    if options.pixels:
        parts.append(Section("Reference", _pixels(), []))
    print(markdown(_TITLE, parts, terminal=True), end="")
    if options.out:
        try:
            write(parts, options.out)
        except OSError as error:
            sys.exit(f"fedsparse: {error}")
        print(f"\nreport: {options.out / PAGE}")
    if failed:
        sys.exit(f"fedsparse: {failed} {'folder was' if failed == 1 else 'folders were'} not scaled, see above")


def _pixels() -> str:
    return f"Centralised logistic regression on the pixels of the digits: {pixels_accuracy():.1%} test accuracy."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, folders that hold some, or files of --save")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md, report.html, PNGs and tables here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was read into one file, FILE.csv.gz")
    parser.add_argument("--target", type=_fraction, default=0.95, help="fraction of the best dense accuracy (0.95)")
    parser.add_argument("--reach", type=_fraction, help="also count rounds to this validation accuracy, such as 0.9")
    parser.add_argument("--scale", action="store_true", help="evaluate scaled task vectors; builds data and models")
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="NAME", help="with --scale: packages whose code runs may name"
    )
    parser.add_argument("--pixels", action="store_true", help="add a logistic regression on the pixels of the digits")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a fraction above 0 and at most 1, not {text}")
    return value


if __name__ == "__main__":
    with command():
        main()
