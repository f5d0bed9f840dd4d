"""Repeat the best of a sweep with more seeds: ``python -m fedsparse.repeat <sweep folder> --seeds 1 2 3 4 [--jobs 2]``.

A sweep over learning rates with all seeds spends most of its time on rates that are not used. Sweep them with one seed,
and repeat each cell with the others at the rate that validated best. Like a sweep it skips what is finished, goes on
with what was stopped, and puts each cell into a folder named after its overrides, in the same sweep folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from joblib import Parallel, delayed
from omegaconf import DictConfig

from fedsparse.analysis.folders import Run, read_runs
from fedsparse.analysis.table import once, rows
from fedsparse.core.signals import command
from fedsparse.job import trust
from fedsparse.job.command import one_line
from fedsparse.job.earlier import renewed, typed_now
from fedsparse.job.resume import composed, refuse_stored_overrides
from fedsparse.job.runs import compose_and_run, run_cell
from fedsparse.job.sweep import MAY_DIFFER, CellFailed, cell_name, shown

CHECKED = "+hydra.callbacks.fresh_run_folder.refuse=false"  # the cell itself looks whose a used folder is
BESIDE = "hydra/launcher=joblib"  # names what happens: cells side by side keep their progress off the terminal


def cells(folder: Path, seeds: Sequence[int], into: Path | None = None) -> Iterator[tuple[list[str], Path]]:
    """List what is to be run: the overrides and the folder of the best cell of every row, with each of the seeds.

    Args:
        folder: the sweep.
        seeds: of the repetitions.
        into: where their folders go; None: into the sweep's own.

    Raises:
        ValueError: no finished run is there.

    """
    runs, _ = read_runs([folder], renewed)
    best = [overrides_of(row.runs[0]) for row in rows(once(runs)[0])]
    left_out = [key for key in MAY_DIFFER if len({_value(key, typed) for typed in best}) == 1]  # as in the sweep itself
    for typed in best:
        for seed in seeds:
            wanted = [o for o in typed if not o.startswith("seed=")] + [f"seed={seed}"]
            yield wanted, (into or folder) / cell_name(wanted, left_out)


def _value(key: str, overrides: Sequence[str]) -> str | None:
    """Value that overrides give a key."""
    return next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), None)


def overrides_of(run: Run) -> list[str]:
    """Read what was typed for a run, as it was stored."""
    return trust.overrides(run.folder)


def execute_cell(cfg: DictConfig) -> dict[str, object]:
    """Carry out one cell: what is finished is only reported, what was stopped goes on."""
    hydra_cfg = HydraConfig.get()
    job = composed(cfg, hydra_cfg)
    return run_cell(replace(job, group=job.folder.parent.name), hydra_cfg)


def run(
    overrides: Sequence[str],
    folder: Path,
    beside: bool = False,
    trusted: Sequence[str] = (),
    config_dir: Path | None = None,
) -> bool:
    """Compose and carry out one cell, maybe beside others; False if it failed, which it has said.

    Args:
        overrides: as they were stored.
        folder: of the cell.
        beside: whether others run at the same time.
        trusted: names of packages whose code the overrides may name.
        config_dir: a folder of the reader's own options, as ``--config-dir`` of ``fedsparse.train``.

    """
    own = [] if config_dir is None else [f"hydra.searchpath=['file://{config_dir.absolute()}']"]
    options = [CHECKED, f"hydra.run.dir={folder.absolute()}", *([BESIDE] if beside else [])]
    try:
        wanted = typed_now(overrides)  # while the folder keeps the name that it had then
        refuse_stored_overrides(wanted, trusted, own)
        compose_and_run(execute_cell, [*wanted, *own, *options])
    except CellFailed:
        return False
    except Exception as error:
        print(f"fedsparse: {shown(folder)}: {one_line(error)}", file=sys.stderr, flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a sweep folder with finished cells")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time (pip install 'fedsparse[sweep]')")
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="for their folders: seeds that chose a rate stay apart"
    )
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="NAME", help="packages whose code the stored runs may name"
    )
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="the folder of your own options that the runs were begun with"
    )
    options = parser.parse_args(arguments)
    try:
        trusted = trust.checked(options.trust)
        listed = list(cells(options.folder, options.seeds, options.into))
    except ValueError as error:
        sys.exit(f"fedsparse: {error}")
    print(f"{len(listed)} cells in {options.into or options.folder}", flush=True)
    beside = options.jobs > 1
    done = Parallel(n_jobs=options.jobs)(delayed(run)(*cell, beside, trusted, options.config_dir) for cell in listed)
    if not all(done):
        sys.exit(f"fedsparse: {done.count(False)} cells failed, see above; the same command skips what is finished")


if __name__ == "__main__":
    with command():
        main()
