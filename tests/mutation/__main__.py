"""Make random mutants of the core and say which no test notices.

Usage: ``PYTHONPATH=tests python -m mutation [--number 300] [--seed 0] [--jobs 2]``, in the project's root. To see
whether the tests of a file notice the mutants of some lines, without a recording of the whole suite:
``--at fedsparse/optim/sgdm.py:29,102 --tests tests/optim/test_optim.py``.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from mutation.mutants import Mutant, mutants, sample
from mutation.run import Run, Verdict
from mutation.tree import core_files, read_explanations


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return the exit code: 0 if enough mutants were noticed."""
    args = _parser().parse_args(arguments)
    root = Path(args.root).resolve()
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutate"]
    files = core_files(root, settings["core"])
    everything = [m for file in files for m in mutants(file, (root / file).read_text(encoding="utf-8"))]
    explained = read_explanations(root / settings["explained"])
    chosen = _at(everything, args.at) if args.at else sample(everything, args.number, args.seed)
    run = Run(root, settings, files, jobs=args.jobs, cap=args.cap)
    try:
        verdicts = run.judge(chosen, args.tests, recorded=not args.at)
    finally:
        run.close()
    return _report(verdicts, explained, run.unsound, settings["goal"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300, help="of mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--cap", type=float, default=60.0, help="seconds of tests for each mutant")
    parser.add_argument("--root", default=".", help="the project's root")
    at = "every mutant of these lines instead, by all tests of the files of --tests"
    parser.add_argument("--at", action="append", metavar="FILE[:LINE,LINE]", help=at)
    parser.add_argument("--tests", nargs="+", metavar="FILE", default=[], help="only these files of tests")
    return parser


def _at(everything: list[Mutant], places: list[str]) -> list[Mutant]:
    """Mutants of the lines asked for."""
    chosen = []
    for place in places:
        file, _, lines = place.partition(":")
        numbers = {int(line) for line in lines.split(",") if line}
        chosen += [m for m in everything if m.file == file and (not numbers or m.line in numbers)]
    return chosen


def _report(verdicts: list[Verdict], explained: dict[str, str], unsound: set[str], goal: float) -> int:
    """Print a line for each that no test noticed, and the sums."""
    for test in sorted(unsound):
        print(f"left out, it fails without a mutant: {test}")
    survivors = [verdict for verdict in verdicts if not verdict.noticed]
    for verdict in survivors:
        why = explained.get(verdict.mutant.key)
        print(f"{verdict.word}: {verdict.mutant.key}  (line {verdict.mutant.line})" + (f"\n    {why}" if why else ""))
    noticed = len(verdicts) - len(survivors)
    told = sum(verdict.mutant.key in explained for verdict in survivors)
    capped = sum(verdict.word == "not noticed within the cap" for verdict in survivors)
    share = noticed / max(1, len(verdicts))
    print(
        f"{len(verdicts)} mutants: {noticed} noticed ({share:.1%}), {len(survivors)} not ({told} explained, "
        f"{capped} met the cap); at least {goal:.0%} are to be noticed"
    )
    return 0 if share >= goal else 1


if __name__ == "__main__":
    sys.exit(main())
