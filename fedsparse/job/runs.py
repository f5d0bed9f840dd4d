"""Starts runs: a single run, a sweep and its cells, or a resumed run.

What trains is imported after the configuration is composed and checked: a mistake in it is found without torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from fedsparse.core.checks import check_number
from fedsparse.core.waits import waiting
from fedsparse.job import trust
from fedsparse.job.command import hydras_as_value_errors, logging_kept, one_line
from fedsparse.job.config import check_alone, check_values, register_resolvers
from fedsparse.job.heading import announce
from fedsparse.job.outcome import Outcome, Outcomes, typed
from fedsparse.job.resume import Job, composed, continued, finished, open_log, read_job, store
from fedsparse.job.shipped import conf_dir
from fedsparse.job.sweep import CellFailed, beside_others, locked, short_path
from fedsparse.job.typed import check_typed
from fedsparse.job.unread import check_taken

log = logging.getLogger("fedsparse")


def run(overrides: Sequence[str] = (), **keys: Any) -> Outcome:
    """Run as the command line does; returns the summary.

    Args:
        overrides: as on the command line, such as ``["mask_rule=random", "partition=noniid_nc1"]``; of a repeated key
            the last counts.
        keys: the same as keywords, after these: ``mask_rule="random"``, ``federation={"rounds": 3}``.

    Returns:
        The contents of ``summary.json``, and the run folder as ``folder``; with ways to model, mask and metrics.

    Raises:
        ValueError: the configuration is invalid; one line with the key and its valid values.

    """
    import torchmetrics  # noqa: F401  whole, as the program that calls may use all of it

    register_resolvers()
    overrides = [*overrides, *typed(keys)]
    check_typed(overrides)
    resumed = resume_folder(overrides)
    if resumed is None:
        return Outcome(compose_and_run(execute_hydra, overrides))
    with hydras_as_value_errors():
        return Outcome(resume(resumed, [o for o in overrides if not o.startswith("resume=")]))


def sweep(overrides: Sequence[str] = (), *, jobs: int = 1, **keys: Any) -> Outcomes:
    """Run every combination of what is swept as ``python -m fedsparse.train -m`` does; returns a table.

    Each cell has a folder named after its overrides, in ``hydra.sweep.dir``. In a folder of before, finished cells are
    read and not run again, and stopped ones go on.

    Args:
        overrides: as on the command line, such as ``["mask_rule=random,dense", "federation.rounds=3"]``.
        jobs: cells at the same time, each in a process that is used again (``hydra/launcher=joblib``).
        keys: the same as keywords, after these; a list is swept: ``seed=[0, 1]``, ``federation={"rounds": [3, 6]}``. A
            tuple is one value, a list.

    Returns:
        A row for each cell, in the order of the product: the values that were swept, the contents of its
        ``summary.json`` and its folder, with ways to model, mask and metrics.

    Raises:
        ValueError: the configuration of a cell is invalid, which is found before any runs; or a cell failed, whose line
            was printed, after the others have run.

    """
    import torchmetrics  # noqa: F401  as in run

    check_number("jobs", jobs, whole=True, least=1)
    overrides = [*overrides, *typed(keys, sweeps=True)]
    check_typed(overrides, sweeps=True)
    for given in overrides:
        if given.startswith(("resume=", "hydra/sweeper=")):
            raise ValueError(
                f"{given}: a sweep from Python runs a product in hydra.sweep.dir, and resumes its cells there"
            )
    parsed = OverridesParser.create().parse_overrides(overrides)
    beside = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
    with _hydra() as engine:
        check_values(parsed)
        batches = engine.multirun("train", execute_hydra, [*overrides, *beside, "hydra.mode=MULTIRUN"])
    swept = list(dict.fromkeys(one.get_key_element() for one in parsed if one.is_sweep_override()))
    return Outcomes([_row(done, swept) for batch in batches for done in batch], swept)


def _row(done: Any, swept: Sequence[str]) -> Outcome:
    """Join the values of a cell and its summary; of a name that both have the value that was swept counts."""
    parsed = OverridesParser.create().parse_overrides(list(done.overrides))
    values = {one.get_key_element(): one.value() for one in parsed}
    own = {name: values[name] for name in swept}
    return Outcome(own | done.return_value | own)


@contextmanager
def _hydra() -> Iterator[Hydra]:
    """Open Hydra on the shipped configuration; its errors are ValueErrors of one line, and its logging ends with it."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with (
        logging_kept(),
        initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"),
        hydras_as_value_errors(),
    ):
        engine = GlobalHydra.instance().hydra
        assert engine is not None
        yield engine


def compose_and_run(task: Callable[[DictConfig], dict[str, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a configuration by Hydra, create the run folder and call the task; returns the task's result."""
    check_typed(overrides)
    with _hydra() as engine:
        return engine.run("train", task, list(overrides)).return_value


def resume(folder: Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Resume a stopped run after its last closed round; of a finished run only the summary is returned."""
    trusted, overrides = trust.split(arguments)
    job = read_job(folder, overrides, trusted)
    done = finished(job)
    if done is not None:
        print(f"{folder} is finished after {done['rounds']} rounds; federation.rounds=<more> goes on")
        return done | {"folder": str(folder)}
    with logging_kept(), locked(folder):
        open_log(folder)
        _check(job)
        from fedsparse.job.execute import execute
        from fedsparse.job.summary import print_table

        summary = execute(job)
        print_table(folder, summary)
        return summary


def resume_folder(arguments: Sequence[str]) -> Path | None:
    """Read ``resume=<folder>`` before Hydra does, which would create a new folder first; None without it."""
    folders = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    return Path(folders[-1]) if folders and folders[-1] not in ("", "null") else None


def execute_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Execute the run that Hydra composed."""
    hydra_cfg = HydraConfig.get()
    job = composed(cfg, hydra_cfg)
    return _single(job, hydra_cfg) if job.group is None else run_cell(job, hydra_cfg)


def _single(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    """Execute a run in a new folder, and print its results."""
    _check(job)
    from fedsparse.job.execute import execute
    from fedsparse.job.summary import print_table

    with locked(job.folder):
        store(job, hydra_cfg)
        summary = execute(job)
    print_table(job.folder, summary)
    return summary


def _check(job: Job) -> None:
    """Check a configuration; what the configuration alone says is said before torch is imported.

    Raises:
        ValueError: one line with the key, its value and the valid values.

    """
    check_alone(job.cfg, job.choices)
    shared = beside_others()
    if not shared:
        announce(job)
    with waiting("importing torch and Lightning", shared):
        check_taken(job.cfg, job.choices)
        from fedsparse.job import execute  # noqa: F401  what a run imports


def run_cell(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    """Execute a cell of a sweep: a finished one is only reported, a stopped one resumed.

    Raises:
        CellFailed: the cell failed, and its error was printed; Hydra runs the other cells first.

    """
    try:
        return _cell(continued(job), hydra_cfg)
    except Exception as error:
        print(f"fedsparse: {short_path(job.folder)}: {one_line(error)}", file=sys.stderr, flush=True)
        if not isinstance(error, ValueError):
            log.info("the cell failed", exc_info=True)
        keep = getattr(error, "keep", not isinstance(error, ValueError))
        raise CellFailed("a cell failed, see above; the same command skips what is finished", keep) from None


def _cell(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    done = finished(job) if job.resumed else None
    if done is not None:
        print(f"{short_path(job.folder)} is finished after {done['rounds']} rounds", flush=True)
        return done | {"folder": str(job.folder)}
    _check(job)
    from fedsparse.job.execute import execute
    from fedsparse.job.summary import at_chance, headline

    with locked(job.folder):
        if not job.resumed:
            store(job, hydra_cfg)
        summary = execute(job)
    figures = f"{headline(summary)} after round {summary['rounds']}, {summary['seconds']:.1f} s"
    print(f"{short_path(job.folder)}: {figures}", flush=True)
    if line := at_chance(summary):
        print(f"{short_path(job.folder)}: {line}", flush=True)
    return summary
