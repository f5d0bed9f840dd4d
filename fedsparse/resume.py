"""Going on with a run that was stopped: its stored configuration, and the few keys that may change."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from fedsparse import files
from fedsparse.config import conf_dir, refuse_foreign_targets
from fedsparse.federation.phases import Phases
from fedsparse.sweep import already_used, difference, used

ALLOWED = "on resume only federation.rounds, trainer.* and logger may be given"


@dataclass(frozen=True)
class Job:
    """A run to carry out.

    Attributes:
        cfg: its configuration, without Hydra's own part.
        folder: its run folder.
        choices: option chosen of each config group.
        group: name shared by the runs of a sweep, or None.
        resumed: whether the folder holds a run to go on with.

    """

    cfg: DictConfig
    folder: Path
    choices: dict[str, str]
    group: str | None = None
    resumed: bool = False


def facts(hydra_cfg: Any) -> tuple[dict[str, str], str | None]:
    """Read the chosen options and the sweep's name from Hydra's own configuration."""
    choices = {str(k): str(v) for k, v in hydra_cfg.runtime.choices.items() if not str(k).startswith("hydra/")}
    sweep = "MULTIRUN" in str(hydra_cfg.mode)
    return choices, Path(str(hydra_cfg.sweep.dir)).name if sweep else None


def store(job: Job, hydra_cfg: Any) -> None:
    """Write the configuration into the run folder, as Hydra would, but each file whole or not at all."""
    own = OmegaConf.to_container(hydra_cfg, enum_to_str=True)
    assert isinstance(own, dict)
    own["sweep"]["dir"] = str(hydra_cfg.sweep.dir)  # a ${now:} in it would name another sweep on resume
    stored = {"hydra.yaml": OmegaConf.create({"hydra": own}), "config.yaml": job.cfg}
    folder = job.folder / ".hydra"
    folder.mkdir(exist_ok=True)
    for name, node in {**stored, "overrides.yaml": hydra_cfg.overrides.task}.items():
        files.write(folder / name, OmegaConf.to_yaml(node))


def as_found(job: Job) -> Job:
    """Take a cell of a sweep as it stands in its folder: not begun, or the same run to go on with.

    Raises:
        ValueError: the folder holds another run; it is not touched.

    """
    if not used(job.folder):
        return job
    stored = job.folder / ".hydra" / "config.yaml"
    if not stored.is_file():
        raise ValueError(already_used(job.folder))
    cfg = OmegaConf.load(stored)
    assert isinstance(cfg, DictConfig)
    different = difference(cfg, job.cfg)
    if different is not None:
        raise ValueError(f"another run is stored here: {different}; choose another hydra.sweep.dir")
    return replace(job, resumed=True)


def read_job(folder: Path, overrides: Sequence[str]) -> Job:
    """Read the stored run of a folder, which may have been moved, and apply what may be overridden.

    Raises:
        ValueError: no run is stored there, an override is not allowed, or a ``_target_`` is of another package.

    """
    stored = folder / ".hydra" / "config.yaml"
    if not stored.is_file():
        raise ValueError(
            f"{folder} holds no run to resume: {stored} is missing; give the run folder that a run printed"
        )
    cfg = OmegaConf.load(stored)
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    for override in overrides:
        _apply(cfg, override)
    refuse_foreign_targets(OmegaConf.to_container(cfg, resolve=True))
    choices, group = facts(OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra)
    return Job(cfg, folder, choices, group, resumed=True)


def _apply(cfg: DictConfig, override: str) -> None:
    """Apply one override, or refuse it."""
    key, found, value = override.partition("=")
    if key == "logger" and found:
        with open_dict(cfg):
            cfg.logger = _compose_logger(value)
    elif found and (key == "federation.rounds" or key.startswith("trainer.")):
        with open_dict(cfg):
            OmegaConf.update(cfg, key, OmegaConf.create(f"v: {value}").v, force_add=True)
    else:
        raise ValueError(f"{override}: {ALLOWED}; the rest comes from the stored run")


def _compose_logger(option: str) -> Any:
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=[f"logger={option}"]).logger


def finished(job: Job) -> dict[str, Any] | None:
    """Summary of a folder whose run is finished with as many rounds as asked for, or None.

    A run that stopped early by itself, with fewer rounds than were asked for when it was carried out, is finished too.
    """
    path = job.folder / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    asked = summary.get("rounds_asked")  # a summary of before this was noted: what the run began with
    if asked is None:
        asked = _rounds(OmegaConf.load(job.folder / ".hydra" / "config.yaml"))
    return summary if _rounds(job.cfg) <= max(summary["rounds"], asked) else None


def _rounds(cfg: Any) -> int:
    """All rounds of a run, those of an exploration too; runs of before there were phases have theirs alone."""
    if "phases" not in cfg:
        return int(cfg.federation.rounds)
    return Phases.of(OmegaConf.to_container(cfg.phases, resolve=True)).total  # type: ignore[arg-type]


def open_log(folder: Path) -> None:
    """Go on writing to run.log, and show warnings, as Hydra does in a fresh run."""
    handler: logging.Handler = files.LogFile(folder / "run.log", encoding="utf-8")
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.WARNING)
    for one in (handler, console):
        one.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(one)
    logging.getLogger().setLevel(logging.INFO)
