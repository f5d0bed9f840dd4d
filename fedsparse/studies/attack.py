"""What an attack does to each aggregation rule: ``python -m fedsparse.studies.attack <folder of finished runs> ...``.

It reads run folders and nothing else (``make attack`` makes them), and prints a Markdown table: each rule without and
with attackers, and how far it stays from FedAvg without, paired by seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsparse.analysis.files import finite
from fedsparse.analysis.folders import Run, read_runs
from fedsparse.analysis.statistics import Interval, paired
from fedsparse.core.signals import command
from fedsparse.data.files import printable
from fedsparse.job.earlier import renewed

Cell = tuple[str, bool]  # rule, whether there are attackers
PLAIN = "WeightedMean"  # averages whatever comes: it claims no robustness
LEAST = -0.03  # a robust rule is to stay within 3 points
HEAD = "| rule | no attackers, % | attackers, % | attackers, difference to FedAvg without, points | within 3 points |"
_NOBODY = ("None", "null", "0")


def rule(run: Run) -> str:
    """Name a run's aggregation, with the options that it was given."""
    options = {key.rsplit(".", 1)[-1]: value for key, value in run.config.items() if key.startswith("aggregation.")}
    name = run.config.get("aggregation.average._target_", run.config["aggregation._target_"]).rsplit(".", 1)[-1]
    shown = [f"{key}={options[key]}" for key in ("attackers", "trim") if key in options]
    return ", ".join([name, *shown])


def cells(runs: Sequence[Run]) -> dict[Cell, dict[int, float]]:
    """Collect test accuracies by rule, attack and seed."""
    found: dict[Cell, dict[int, float]] = {}
    for run in runs:
        attacked = run.config.get("exchange.attackers", "None") not in _NOBODY
        if finite(run.summary["test/acc"]):
            found.setdefault((rule(run), attacked), {})[run.seed] = run.summary["test/acc"]
    return found


def table(found: Mapping[Cell, Mapping[int, float]]) -> str:
    """Write the table, the rule that stays nearest first.

    Raises:
        ValueError: FedAvg without attackers, or with, is missing.

    """
    for attacked in (False, True):
        if (PLAIN, attacked) not in found:
            raise ValueError(f"no run of aggregation=weighted_mean {'with' if attacked else 'without'} attackers")
    clean = found[PLAIN, False]
    apart = {name: paired(found[name, True], clean) for name, attacked in found if attacked}
    order = sorted(apart, key=lambda name: (-apart[name].mean, name))
    return "\n".join([HEAD, "|---|---:|---:|---:|---|", *(_line(name, found, apart[name]) for name in order)])


def _line(name: str, found: Mapping[Cell, Mapping[int, float]], apart: Interval) -> str:
    without, under = (Interval.of(list(found.get((name, attacked), {}).values())) for attacked in (False, True))
    verdict = ("yes" if apart.mean >= LEAST else "**no**") if name != PLAIN else "not claimed"
    return f"| {name} | {without.percent()} | {under.percent()} | {apart.percent('+')} | {verdict} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the runs below some folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that hold some at any depth")
    try:
        runs, problems = read_runs(parser.parse_args(arguments).folders, renewed)
        text = table(cells(runs))
    except ValueError as error:
        sys.exit(printable(f"fedsparse: {error}"))
    print(text)
    print(f"\nTest accuracy over {len({run.seed for run in runs})} seeds, mean ± 95 % interval (Student's t).")
    for problem in problems:
        print(printable(f"left out: {problem.name}: {problem.reason}"))


if __name__ == "__main__":
    with command():
        main()
