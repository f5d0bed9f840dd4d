"""The main job: ``python -m fedsparse.train [group=option] [key=value]``, or ``resume=<run folder>``."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedsparse import build, results
from fedsparse.config import RunFolderUsed, check, conf_dir, register_resolvers
from fedsparse.federation.calibration import Calibrated
from fedsparse.federation.checkpoint import choose_checkpoint, read_checkpoint
from fedsparse.federation.client import ClientModule
from fedsparse.federation.csv import read_rows
from fedsparse.federation.ledger import Ledger
from fedsparse.federation.rounds import EveryUpdateDropped
from fedsparse.federation.tracking import hand_on
from fedsparse.masks import Mask
from fedsparse.prepare import MASK, OVERLAP, mean_client_overlap, prepare, sparsity_of
from fedsparse.resume import Job, as_found, facts, finished, open_log, read_job, store
from fedsparse.sweep import CellFailed, held, shown

log = logging.getLogger("fedsparse")
TERMINATED = 143  # 128 + SIGTERM


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run as the command line does, and return the summary.

    Args:
        overrides: what one would type, such as ``["mask_rule=random", "partition=noniid_nc1"]``.

    Returns:
        What ``summary.json`` holds, and the run folder under ``folder``.

    Raises:
        ValueError: the configuration cannot be run; one line says what is wrong and what would be right.

    """
    register_resolvers()
    resumed = _resume_folder(overrides)
    if resumed is not None:
        return resume(resumed, [o for o in overrides if not o.startswith("resume=")])
    return compose_and_run(execute_hydra, overrides)


def compose_and_run(task: Callable[[DictConfig], dict[str, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    """Let Hydra compose a configuration, make the run folder and call the task; returns what that returns."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"):
        try:
            engine = GlobalHydra.instance().hydra
            assert engine is not None
            job = engine.run("train", task, list(overrides))
        except RunFolderUsed as error:
            raise ValueError(str(error)) from None
    return job.return_value


def resume(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a stopped run after its last closed round; a finished one is only reported."""
    job = read_job(folder, overrides)
    done = finished(job)
    if done is not None:
        print(f"{folder} is finished after {done['rounds']} rounds; federation.rounds=<more> goes on")
        return done | {"folder": str(folder)}
    handler = open_log(folder)
    try:
        check(job.cfg)
        summary = execute(job)
        results.print_table(folder, summary)
        return summary
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def execute_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Carry out the run that Hydra composed."""
    hydra_cfg = HydraConfig.get()
    job = Job(cfg, Path(hydra_cfg.runtime.output_dir), *facts(hydra_cfg))
    return _single(job, hydra_cfg) if job.group is None else run_cell(job, hydra_cfg)


def _single(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    """Carry out a run in a fresh folder, and show what came out."""
    check(job.cfg)
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
        raise CellFailed("a cell failed, see above; the same command skips what is finished") from None


def _cell(job: Job, hydra_cfg: Any) -> dict[str, Any]:
    done = finished(job) if job.resumed else None
    if done is not None:
        print(f"{shown(job.folder)} is finished after {done['rounds']} rounds", flush=True)
        return done | {"folder": str(job.folder)}
    check(job.cfg)
    if not job.resumed:
        store(job, hydra_cfg)
    summary = execute(job)
    figures = f"test accuracy {summary['test/acc']:.1%} after round {summary['rounds']}, {summary['seconds']:.1f} s"
    print(f"{shown(job.folder)}: {figures}", flush=True)
    return summary


def execute(job: Job) -> dict[str, Any]:
    """Carry out a run, alone in its folder: build, prepare head and mask, train, write."""
    with held(job.folder):
        return _execute(job)


def _execute(job: Job) -> dict[str, Any]:
    quiet()
    log.info("process %d", os.getpid())
    federation = build.build_federation(job.cfg)
    module, ledger = build.build_module(job.cfg, federation), Ledger()
    checkpoint = _checkpoint(job, federation)
    found = prepare(job, federation, module, ledger) if checkpoint is None else _stored(job, federation, checkpoint)
    module.set_mask(found.mask.row(federation.space), found.bitmaps)
    return _train(job, federation, module, found, ledger, checkpoint)


def _train(
    job: Job,
    federation: build.Federation,
    module: ClientModule,
    found: Calibrated,
    ledger: Ledger,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train to the last round, and write the results."""
    rounds = build.build_rounds(job.cfg, federation, found.mask, ledger, module, job.folder)
    callbacks = build.build_callbacks(job.cfg, rounds, federation, found.mask, job.folder, _beside_others())
    closed = 0 if checkpoint is None else read_checkpoint(checkpoint, federation.space)["epoch"] + 1
    if closed > job.cfg.federation.rounds:
        raise ValueError(f"{closed} rounds are closed already; federation.rounds={job.cfg.federation.rounds} is fewer")
    loggers = build.build_loggers(job.cfg, job.folder, job.group, closed)
    trainer = build.build_trainer(job.cfg, callbacks, loggers)
    trainer.fit(module, build.build_datamodule(job.cfg, federation), ckpt_path=checkpoint)
    if callbacks.stop.received:
        said = ", ".join(number.name for number in callbacks.stop.received)
        log.warning("%s: round %d is closed and saved; go on with resume=%s", said, trainer.current_epoch, job.folder)
        hand_on(callbacks.stop.received)
        raise SystemExit(TERMINATED)
    summary = results.summarise(
        federation,
        rounds,
        found.mask,
        read_rows(job.folder / "metrics.csv"),
        seconds=callbacks.log.seconds,
        seed=job.cfg.seed,
        head=job.cfg.head.init,
        sparsity=sparsity_of(found.mask, federation.space.where(job.cfg.sparsity.always_train), federation.space),
        mask_overlap_rounds=list(found.overlap),
        mask_overlap_clients=mean_client_overlap(found, federation.space),
        **_chosen(job),
    )
    results.write_results(job.folder, federation, summary, job.cfg.pictures)
    return summary | {"folder": str(job.folder)}


def _beside_others() -> bool:
    """Whether this is one of several jobs that a launcher of Hydra runs at the same time."""
    return HydraConfig.initialized() and not str(HydraConfig.get().launcher._target_).endswith("BasicLauncher")


def _chosen(job: Job) -> dict[str, str | None]:
    """The options that name a run, as the summary keeps them."""
    keys = ("mask_rule", "partition", "data", "model", "experiment")
    return {key: None if job.choices.get(key) in (None, "None", "null") else job.choices[key] for key in keys}


def _stored(job: Job, federation: build.Federation, checkpoint: Path) -> Calibrated:
    """Take the masks of a checkpoint, under the words of the run's mask file."""
    state = read_checkpoint(checkpoint, federation.space)["state_dict"]
    path = job.folder / MASK
    words = Mask.load(path).metadata if path.is_file() else {}
    overlap = tuple(json.loads(words.get(OVERLAP, "[]")))
    return Calibrated(Mask(federation.space.unflatten(state["mask"]), words), state["bitmaps"], overlap)


def _checkpoint(job: Job, federation: build.Federation) -> Path | None:
    """Choose what a resumed run goes on from."""
    if not job.resumed:
        return None
    path, complaints = choose_checkpoint(job.folder / "checkpoints", federation.space)
    for complaint in complaints:
        log.warning("%s; the one before it is used", complaint)
    return path


def _resume_folder(arguments: Sequence[str]) -> Path | None:
    """Folder of ``resume=<folder>`` among the arguments: Hydra would write into a fresh one before it is read."""
    given = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    return Path(given[-1]) if given and given[-1] not in ("", "null") else None


def quiet() -> None:
    """Keep what Lightning says about itself off the terminal; warnings that a person can act on stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "Checkpoint directory",
        "`isinstance\\(treespec",
        "smaller than the logging",
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")


def one_line(error: BaseException) -> str:
    """Say an error in one line; of what failed while Hydra built a part, the part's own words."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(
        str(error).split("Config search path")[0].replace("\nAvailable options", ". Available options").split()
    )
    if isinstance(error, ConfigCompositionException) and text.startswith("Could not override"):
        text = f"there is no key {text.split()[3].strip('.')}; --cfg job lists all keys with their values"
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    expected = isinstance(error, ValueError | OSError | EveryUpdateDropped | HydraException | OmegaConfBaseException)
    return text if expected and text else f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)"


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> float | None:
    return execute_hydra(cfg).get("val/acc")  # what Optuna's sweeper maximises


def main() -> None:
    """Entry point of the command line."""

    def body() -> None:
        folder = _resume_folder(sys.argv[1:])
        if folder is not None:
            resume(folder, [a for a in sys.argv[1:] if not a.startswith("resume=")])
        else:
            _hydra_main()

    on_command_line(body)


def on_command_line(body: Callable[[], Any]) -> None:
    """Carry out what a person typed: errors are one line, and a traceback with HYDRA_FULL_ERROR=1."""
    register_resolvers()
    warnings.formatwarning = lambda message, *_, **__: f"fedsparse: warning: {message}\n"
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets errors through to us
    try:
        body()
    except Exception as error:
        if full:
            raise
        print(f"fedsparse: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
