"""Repeat the best of a sweep with more seeds: ``python -m fedsparse.repeat <sweep folder> --seeds 1 2 3 4 [--jobs 2]``.

A sweep over learning rates with all seeds spends most of its time on rates that are not used. Sweep them with one seed,
and repeat each cell with the others at the rate that validated best. As in a sweep, finished cells are skipped, stopped
ones resumed, and each cell has a folder named after its overrides, in the same sweep folder.
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
from fedsparse.core.signals import command
from fedsparse.job import trust
from fedsparse.job.command import one_line
from fedsparse.job.earlier import renewed, typed_now
from fedsparse.job.resume import composed, refuse_stored_overrides, without_entity
from fedsparse.job.runs import compose_and_run, run_cell
from fedsparse.job.sweep import MAY_DIFFER, CellFailed, cell_name, short_path

CHECKED = "+hydra.callbacks.fresh_run_folder.refuse=false"  # run_cell checks a used folder instead
BESIDE = "hydra/launcher=joblib"  # as the launcher of a sweep with several jobs, for which runs show no progress bar


def cells(folder: Path, seeds: Sequence[int], into: Path | None = None) -> Iterator[tuple[list[str], Path]]:
    """Iterate over the cells to run: overrides and folder of every row's best cell, with each seed.

    Args:
        folder: of the sweep.
        seeds: of the repetitions.
        into: parent of the cells' folders; None: the sweep folder.

    Raises:
        ValueError: the sweep has no finished run.

    """
    from fedsparse.analysis.table import once, rows  # here, so that --help imports no scipy

    runs, _ = read_runs([folder], renewed)
    best = [overrides_of(row.runs[0]) for row in rows(once(runs)[0])]
    left_out = [
        key for key in MAY_DIFFER if len({_value(key, overrides) for overrides in best}) == 1
    ]  # as the sweep names cells
    for overrides in best:
        for seed in seeds:
            cell = [o for o in overrides if not o.startswith("seed=")] + [f"seed={seed}"]
            yield cell, (into or folder) / cell_name(cell, left_out)


def _value(key: str, overrides: Sequence[str]) -> str | None:
    """Find the value of a key in overrides, or None."""
    return next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), None)


def overrides_of(run: Run) -> list[str]:
    """Read the stored overrides of a run."""
    return trust.overrides(run.folder)


def execute_cell(cfg: DictConfig) -> dict[str, object]:
    """Execute one cell: a finished one is only reported, a stopped one resumed."""
    hydra_cfg = HydraConfig.get()
    without_entity(cfg)
    job = composed(cfg, hydra_cfg)
    return run_cell(replace(job, group=job.folder.parent.name), hydra_cfg)


def run(
    overrides: Sequence[str],
    folder: Path,
    beside: bool = False,
    trusted: Sequence[str] = (),
    config_dir: Path | None = None,
) -> bool:
    """Compose and execute one cell; False if it failed, after its error was printed.

    Args:
        overrides: as stored.
        folder: of the cell.
        beside: whether other cells run at the same time.
        trusted: packages whose code the overrides may name.
        config_dir: a folder of the user's options, as ``--config-dir`` of ``fedsparse.train``.

    """
    search_path = [] if config_dir is None else [f"hydra.searchpath=['file://{config_dir.absolute()}']"]
    options = [CHECKED, f"hydra.run.dir={folder.absolute()}", *([BESIDE] if beside else [])]
    try:
        migrated = typed_now(overrides)  # the folder's name keeps the stored form
        refuse_stored_overrides(migrated, trusted, search_path)
        compose_and_run(execute_cell, [*migrated, *search_path, *options])
    except CellFailed:
        return False
    except Exception as error:
        print(f"fedsparse: {short_path(folder)}: {one_line(error)}", file=sys.stderr, flush=True)
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
