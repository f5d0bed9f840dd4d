"""The main job: ``python -m fedsparse.train [group=option] [key=value]``, or ``resume=<run folder>``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsparse import results, team, trust
from fedsparse.advice import no_key, no_option
from fedsparse.config import RunFolderUsed, check, register_resolvers
from fedsparse.core import parallel, signals
from fedsparse.data.files import printable
from fedsparse.execute import execute, follow
from fedsparse.federation.reports import Diverged
from fedsparse.resume import Job, as_found, composed, finished, open_log, read_job, store
from fedsparse.shipped import conf_dir
from fedsparse.sweep import CellFailed, held, shown
from fedsparse.typed import arranged, check_typed, given_twice

log = logging.getLogger("fedsparse")
EXPECTED = (ValueError, OSError, Diverged, HydraException, OmegaConfBaseException, YAMLError)


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run as the command line does, and return the summary.

    Args:
        overrides: what one would type, such as ``["mask_rule=random", "partition=noniid_nc1"]``; of a key that is given
            twice the last counts.

    Returns:
        What ``summary.json`` holds, and the run folder under ``folder``.

    Raises:
        ValueError: the configuration cannot be run; one line says what is wrong and what would be right.

    """
    register_resolvers()
    check_typed(overrides)
    resumed = _resume_folder(overrides)
    if resumed is None:
        return compose_and_run(execute_hydra, overrides)
    with hydras_as_value_errors():
        return resume(resumed, [o for o in overrides if not o.startswith("resume=")])


@contextmanager
def hydras_as_value_errors() -> Iterator[None]:
    """Let what Hydra and OmegaConf raise be a ValueError of the line that the command line prints."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(one_line(error)) from error
    except RunFolderUsed as error:
        raise ValueError(str(error).removeprefix("fedsparse: ")) from None


def compose_and_run(task: Callable[[DictConfig], dict[str, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    """Let Hydra compose a configuration, make the run folder and call the task; returns what that returns."""
    register_resolvers()
    check_typed(overrides)
    GlobalHydra.instance().clear()
    with (
        logging_kept(),
        initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"),
        hydras_as_value_errors(),
    ):
        engine = GlobalHydra.instance().hydra
        assert engine is not None
        return engine.run("train", task, list(overrides)).return_value


def resume(folder: Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a stopped run after its last closed round; a finished one is only reported."""
    trusted, overrides = trust.split(arguments)
    job = read_job(folder, overrides, trusted)
    done = finished(job)
    if done is not None:
        print(f"{folder} is finished after {done['rounds']} rounds; federation.rounds=<more> goes on")
        return done | {"folder": str(folder)}
    with logging_kept(), held(folder):
        open_log(folder)
        check(job.cfg, job.choices)
        summary = execute(job)
        results.print_table(folder, summary)
        return summary


@contextmanager
def logging_kept() -> Iterator[None]:
    """Put the log's handlers back after a run: of several runs in one process each writes to its own run.log."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(before):
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)


def execute_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Carry out the run that Hydra composed."""
    hydra_cfg = HydraConfig.get()
    job = composed(cfg, hydra_cfg)
    return _single(job, hydra_cfg) if job.group is None else run_cell(job, hydra_cfg)


def _single(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    """Carry out a run in a fresh folder, and show what came out."""
    check(job.cfg, job.choices)
    with held(job.folder):
        store(job, hydra_cfg)
        summary = execute(job)
    results.print_table(job.folder, summary)
    return summary


def run_cell(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    """Carry out a cell of a sweep: one that is finished is only reported, one that was stopped goes on.

    Raises:
        CellFailed: after a line that says why; Hydra carries out the other cells first.

    """
    try:
        return _cell(as_found(job), hydra_cfg)
    except Exception as error:
        print(f"fedsparse: {shown(job.folder)}: {one_line(error)}", file=sys.stderr, flush=True)
        if not isinstance(error, ValueError):
            log.info("the cell failed", exc_info=True)
        keep = getattr(error, "keep", not isinstance(error, ValueError))
        raise CellFailed("a cell failed, see above; the same command skips what is finished", keep) from None


def _cell(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    done = finished(job) if job.resumed else None
    if done is not None:
        print(f"{shown(job.folder)} is finished after {done['rounds']} rounds", flush=True)
        return done | {"folder": str(job.folder)}
    check(job.cfg, job.choices)
    with held(job.folder):
        if not job.resumed:
            store(job, hydra_cfg)
        summary = execute(job)
    figures = f"test accuracy {summary['test/acc']:.1%} after round {summary['rounds']}, {summary['seconds']:.1f} s"
    print(f"{shown(job.folder)}: {figures}", flush=True)
    if line := results.at_chance(summary):
        print(f"{shown(job.folder)}: {line}", flush=True)
    return summary


def _resume_folder(arguments: Sequence[str]) -> Path | None:
    """Folder of ``resume=<folder>`` among the arguments: Hydra would write into a fresh one before it is read."""
    given = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    return Path(given[-1]) if given and given[-1] not in ("", "null") else None


def one_line(error: BaseException) -> str:
    """Say an error in one line; of what failed while Hydra built a part, the part's own words."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = _hydras(error) or " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    expected = isinstance(error, EXPECTED)
    return printable(text if expected and text else f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)")


def _hydras(error: BaseException) -> str:
    """Say what Hydra and OmegaConf say in their own way; empty for other errors."""
    said = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return no_option(group, option, error.options or ())
    if isinstance(error, ConfigCompositionException) and said.startswith("Could not override"):
        return no_key(said.split()[3].strip("'."))
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.msg:
        return " ".join(f"{error.full_key}: {error.msg}".split("full_key:")[0].split())
    return ""


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> float | None:
    return execute_hydra(cfg).get("val/acc")  # what Optuna's sweeper maximises


def main() -> None:
    """Entry point of the command line."""

    def body() -> None:
        if team.join() and parallel.process() > 0:
            return team.serve(follow)
        arrange()
        folder = _resume_folder(sys.argv[1:])
        if folder is not None:
            resume(folder, [a for a in sys.argv[1:] if not a.startswith("resume=")])
        else:
            with logging_kept():
                _hydra_main()
        parallel.share(None)  # where torchrun or SLURM started the others: there is nothing more
        return team.leave()

    on_command_line(body)


def arrange() -> None:
    """Check what was typed, and let Hydra read its flags wherever they stand."""
    sys.argv[1:] = arranged(sys.argv[1:])
    for line in given_twice(sys.argv[1:]):
        print(printable(f"fedsparse: warning: {line}"), file=sys.stderr)


def on_command_line(body: Callable[[], Any]) -> None:
    """Carry out what a person typed: errors are one line, and a traceback with HYDRA_FULL_ERROR=1."""
    register_resolvers()
    warnings.formatwarning = lambda message, *_, **__: f"fedsparse: warning: {printable(message)}\n"
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets errors through to us
    logging.raiseExceptions = False  # a run.log on a full disk is no traceback
    with signals.command():
        try:
            body()
        except Exception as error:
            if full:
                raise
            print(f"fedsparse: {one_line(error)}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
