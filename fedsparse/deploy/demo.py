"""A fleet on this machine, a run, and the same run in the simulator: ``python -m fedsparse.deploy.demo``.

Makes an authority, the server's certificate and keys, starts the server and four nodes on 127.0.0.1, submits three
rounds on digits, runs the same options in the simulator, prints both side by side, and ends all that it has started.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fedsparse.core.folder import METRICS, SUMMARY, WEIGHTS
from fedsparse.deploy.__main__ import ISOLATIONS, Parser, check_overrides
from fedsparse.deploy.fleet import RUNS
from fedsparse.deploy.joining import free_port
from fedsparse.deploy.processes import check_flower, ended, started, waited
from fedsparse.deploy.superlink import last
from fedsparse.job.command import on_command_line

FOLDER, NODES, LONGEST = Path("runs/deploy"), 4, 120.0
RUN = (
    *("model=mlp", "data=digits", "mask_rule=random", "logger=csv", "pictures=false", "calibration.cache=null"),
    *(f"federation.num_clients={NODES}", "federation.clients_per_round=1.0", "federation.rounds=3"),
    "federation.local_steps=20",
)
ALIKE = ("federation.cohort=1",)  # in the simulator; at nodes a client is alone


def demonstrate(
    folder: Path, overrides: Sequence[str], isolation: str, database: bool
) -> Mapping[str, Mapping[str, Any]]:
    """Run the demonstration.

    Args:
        folder: to write; what was there is removed if it is a demonstration's.
        overrides: of the run, after those of the demonstration.
        isolation: of the nodes.
        database: whether the server keeps its state in a database.

    Returns:
        Summary of the run at nodes and of the simulator's, and where their folders are.

    Raises:
        ValueError: a command failed; with its reason.

    """
    check_flower()
    _clear(folder)
    fleet, typed, memory = folder / "fleet", [*RUN, *overrides], [] if database else ["--memory"]
    _command("init", fleet, "--host", "127.0.0.1", "--port", free_port(), "--nodes", NODES)
    with ExitStack() as stack:
        _await(stack.enter_context(_running(folder, "server", fleet, *memory)), "server ready")
        places = [fleet / f"node-{number}" for number in range(NODES)]
        nodes = [stack.enter_context(_running(folder, "node", place, "--isolation", isolation)) for place in places]
        for node in nodes:
            _await(node, "is connected" if isolation == "kept" else "SuperNode ID")
        _command("submit", fleet, *typed)
    (deployed,) = (path for path in (fleet / RUNS).iterdir() if path.is_dir())
    _command(*typed, *ALIKE, f"hydra.run.dir={folder / 'simulator'}", module="fedsparse.train")
    return {name: _seen(place) for name, place in (("simulator", folder / "simulator"), ("nodes", deployed))}


def compared(seen: Mapping[str, Mapping[str, Any]]) -> Table:
    """Put both runs side by side."""
    table = Table("", *seen)
    for words, key, form in FIGURES:
        table.add_row(words, *(form.format(one[key]) for one in seen.values()))
    table.add_row(
        "largest difference of a final weight", "", f"{difference(*(one['folder'] for one in seen.values())):g}"
    )
    return table


FIGURES = (
    ("seconds of the first round", "first", "{:.2f}"),
    ("seconds a round after it", "later", "{:.2f}"),
    ("bytes up", "bytes_up", "{:,}"),
    ("bytes down", "bytes_down", "{:,}"),
    ("final accuracy", "test/acc", "{:.4f}"),
)


def difference(*folders: Path) -> float:
    """Largest difference of two runs' final weights."""
    from safetensors.torch import load_file

    one, other = (load_file(folder / WEIGHTS) for folder in folders)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def _seen(folder: Path) -> Mapping[str, Any]:
    """Read a run's summary, and its seconds a round."""
    with (folder / METRICS).open(encoding="utf-8") as file:
        first, *later = (float(row["seconds"]) for row in csv.DictReader(file))
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return summary | {"first": first, "later": fmean(later or [first]), "folder": folder}


def _clear(folder: Path) -> None:
    """Remove an earlier demonstration."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "fleet").is_dir():
        raise ValueError(f"{folder} is there and holds no demonstration: give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _typed(arguments: Sequence[Any], module: str) -> list[str]:
    """Command line of a module of ours."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def _command(*arguments: Any, module: str = "fedsparse.deploy") -> None:
    """Run a command to its end, and say so."""
    print("$", "python", *_typed(arguments, module)[1:], flush=True)
    process = subprocess.Popen(_typed(arguments, module))
    with ended(process):
        if process.wait():
            raise ValueError(f"{arguments[0]} failed")


class Running(NamedTuple):
    """A command that was started, and the file of what it says."""

    process: subprocess.Popen
    log: Path


@contextmanager
def _running(folder: Path, *arguments: Any) -> Iterator[Running]:
    """Start a command, and end it at the end of the ``with`` block."""
    log = folder / f"{Path(arguments[1]).name}.log"
    print("$", "python", *_typed(arguments, "fedsparse.deploy")[1:], "&", flush=True)
    with started(_typed(arguments, "fedsparse.deploy"), folder, log) as process:
        yield Running(process, log)


def _await(running: Running, line: str) -> None:
    """Wait for a line of a command.

    Raises:
        ValueError: it ended without it, or takes too long; with its last line.

    """
    process, log = running
    waited(lambda: line in log.read_text(errors="replace") or process.poll() is not None, LONGEST)
    if line not in (said := log.read_text(errors="replace")):
        raise ValueError(f"{log.stem} does not start: {last(said)} ({log})")


def run(arguments: Sequence[str]) -> None:
    """Carry the command out.

    Raises:
        ValueError: one line that says what is wrong.

    """
    start, options = time.monotonic(), parser().parse_args(arguments)
    check_overrides(options.overrides)
    seen = demonstrate(options.folder, options.overrides, options.isolation, options.database)
    Console().print(compared(seen))
    print(f"{time.monotonic() - start:.0f} s in all; all processes are ended")


def parser() -> Parser:
    """Build the parser of the command line."""
    name = "python -m fedsparse.deploy.demo"
    made = Parser(prog=name, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, after the demonstration's")
    made.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"to write ({FOLDER})")
    made.add_argument("--isolation", choices=ISOLATIONS, default=ISOLATIONS[0], help="of the nodes")
    made.add_argument("--database", action="store_true", help="let the server keep its state in a database")
    return made


if __name__ == "__main__":
    on_command_line(partial(run, sys.argv[1:]))
