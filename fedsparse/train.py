"""The main job: ``python -m fedsparse.train [group=option] [key=value]``, or ``resume=<run folder>``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedsparse import build, results
from fedsparse.config import RunFolderUsed, check, conf_dir, register_resolvers
from fedsparse.federation.calibration import Calibration, prepare_mask
from fedsparse.federation.checkpoint import choose_checkpoint, read_checkpoint
from fedsparse.federation.client import ClientModule
from fedsparse.federation.csv import read_rows
from fedsparse.federation.ledger import Ledger
from fedsparse.federation.rounds import EveryUpdateDropped
from fedsparse.masks import Mask
from fedsparse.resume import Job, facts, finished, open_log, read_job

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
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"):
        try:
            engine = GlobalHydra.instance().hydra
            assert engine is not None
            job = engine.run("train", execute_hydra, list(overrides))
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
        return execute(job)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def execute_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Carry out the run that Hydra composed."""
    hydra_cfg = HydraConfig.get()
    return execute(Job(cfg, Path(hydra_cfg.runtime.output_dir), *facts(hydra_cfg)))


def execute(job: Job) -> dict[str, Any]:
    """Carry out a run: build, prepare head and mask, train, write."""
    _quiet()
    check(job.cfg)
    federation = build.build_federation(job.cfg)
    module, ledger = build.build_module(job.cfg, federation), Ledger()
    checkpoint = _checkpoint(job, federation)
    if checkpoint is None:
        mask = _prepare(job, federation, module, ledger)
    else:
        mask = Mask.of(federation.space, read_checkpoint(checkpoint, federation.space)["state_dict"]["mask"])
    module.set_mask(mask.row(federation.space))
    return _train(job, federation, module, mask, ledger, checkpoint)


def _train(
    job: Job, federation: build.Federation, module: ClientModule, mask: Mask, ledger: Ledger, checkpoint: Path | None
) -> dict[str, Any]:
    """Train to the last round, and write the results."""
    rounds = build.build_rounds(job.cfg, federation, mask, ledger)
    callbacks = build.build_callbacks(job.cfg, rounds, federation, mask, job.folder)
    closed = 0 if checkpoint is None else read_checkpoint(checkpoint, federation.space)["epoch"] + 1
    if closed > job.cfg.federation.rounds:
        raise ValueError(f"{closed} rounds are closed already; federation.rounds={job.cfg.federation.rounds} is fewer")
    loggers = build.build_loggers(job.cfg, job.folder, job.group, closed)
    trainer = build.build_trainer(job.cfg, callbacks, loggers)
    trainer.fit(module, build.build_datamodule(federation), ckpt_path=checkpoint)
    if callbacks.stop.asked:
        log.warning("SIGTERM: round %d is closed and saved; go on with resume=%s", trainer.current_epoch, job.folder)
        raise SystemExit(TERMINATED)
    summary = results.summarise(
        federation,
        rounds,
        mask,
        read_rows(job.folder / "metrics.csv"),
        seconds=callbacks.log.seconds,
        seed=job.cfg.seed,
        **{k: job.choices.get(k) for k in ("mask_rule", "partition")},
    )
    results.write_results(job.folder, federation, summary)
    results.print_table(job.folder, summary)
    return summary | {"folder": str(job.folder)}


def _prepare(job: Job, federation: build.Federation, module: ClientModule, ledger: Ledger) -> Mask:
    """Prepare head and mask, and write mask and partition into the run folder."""
    cfg = job.cfg
    results.save_partition(federation, job.choices.get("partition", ""), job.folder / "partition.png")
    mask = prepare_mask(
        build.build_setting(cfg, federation, ledger, module),
        instantiate(cfg.mask_rule),
        instantiate(cfg.sparsity),
        Calibration(**cfg.calibration),
        cfg.model.head,
    )
    mask = Mask(mask.tensors, mask.metadata | {"rule": job.choices.get("mask_rule", mask.metadata["rule"])})
    mask.save(job.folder / "mask.safetensors")
    for layer, density in mask.by_layer().items():
        log.info("density %-30s %.4f", layer, density)
    return mask


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


def _quiet() -> None:
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
def _hydra_main(cfg: DictConfig) -> None:
    execute_hydra(cfg)


def main() -> None:
    """Entry point of the command line: errors are one line, and a traceback with HYDRA_FULL_ERROR=1."""
    register_resolvers()
    warnings.formatwarning = lambda message, *_, **__: f"fedsparse: warning: {message}\n"
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets errors through to us
    try:
        folder = _resume_folder(sys.argv[1:])
        if folder is not None:
            resume(folder, [a for a in sys.argv[1:] if not a.startswith("resume=")])
        else:
            _hydra_main()
    except Exception as error:
        if full:
            raise
        print(f"fedsparse: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
