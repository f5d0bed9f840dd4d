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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsparse.analysis.files import yaml_of
from fedsparse.core import files
from fedsparse.core.folder import CONFIG, HYDRA, LOG, OVERRIDES, SUMMARY
from fedsparse.federation.phases import Phases
from fedsparse.job import trust
from fedsparse.job.shipped import conf_dir
from fedsparse.job.sweep import already_used, difference, used

ALLOWED = "on resume only federation.rounds, trainer.*, logger, calibration.cache and trust may be given"
CACHE = "calibration.cache"


@dataclass(frozen=True)
class Job:
    """A run to carry out.

    Attributes:
        cfg: its configuration, without Hydra's own part.
        folder: its run folder.
        choices: option chosen of each config group.
        group: name shared by the runs of a sweep, or None.
        resumed: whether the folder holds a run to go on with.
        begun: rounds that this run was begun with.

    """

    cfg: DictConfig
    folder: Path
    choices: dict[str, str]
    group: str | None = None
    resumed: bool = False
    begun: int = 0


def facts(hydra_cfg: Any) -> tuple[dict[str, str], str | None]:
    """Read the chosen options and the sweep's name from Hydra's own configuration."""
    chosen = hydra_cfg["runtime"]["choices"].items()
    choices = {str(key): str(value) for key, value in chosen if not str(key).startswith("hydra/")}
    sweep = "MULTIRUN" in str(hydra_cfg["mode"])
    return choices, Path(str(hydra_cfg["sweep"]["dir"])).name if sweep else None


def composed(cfg: DictConfig, hydra_cfg: Any) -> Job:
    """Take the job that Hydra composed, in the folder that it made.

    Raises:
        ValueError: an option of one's own has the name of a shipped one, which Hydra takes instead.

    """
    choices, group = facts(hydra_cfg)
    sources = hydra_cfg["runtime"]["config_sources"]
    folders = [Path(str(source["path"])) for source in sources if source["schema"] == "file"]
    own = [folder for folder in folders if folder.resolve() != conf_dir()]
    for key, option in choices.items():
        file = f"{key}/{option}.yaml"
        hidden = [folder / file for folder in own if (folder / file).is_file()]
        if hidden and (conf_dir() / file).is_file():
            raise ValueError(f"{key}={option} is shipped and cannot be replaced; rename {hidden[0]}")
    return Job(cfg, Path(str(hydra_cfg["runtime"]["output_dir"])), choices, group)


def stored_facts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Read the same of a stored run, as plain data: nothing is resolved.

    Raises:
        ValueError: the file is damaged.

    """
    try:
        return facts(yaml_of(folder / HYDRA)["hydra"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: .hydra/hydra.yaml cannot be read ({type(error).__name__}: {error})") from error


def store(job: Job, hydra_cfg: Any) -> None:
    """Write the configuration into the run folder, as Hydra would, but each file whole or not at all."""
    own = OmegaConf.to_container(hydra_cfg, enum_to_str=True)
    assert isinstance(own, dict)
    own["sweep"]["dir"] = str(hydra_cfg.sweep.dir)  # a ${now:} in it would name another sweep on resume
    (job.folder / CONFIG).parent.mkdir(exist_ok=True)
    stored = {HYDRA: OmegaConf.create({"hydra": own}), CONFIG: job.cfg, OVERRIDES: hydra_cfg.overrides.task}
    for name, node in stored.items():
        files.write(job.folder / name, OmegaConf.to_yaml(node))


def as_found(job: Job) -> Job:
    """Take a cell of a sweep as it stands in its folder: not begun, or the same run to go on with.

    Raises:
        ValueError: the folder holds another run; it is not touched.

    """
    if not used(job.folder):
        return job
    stored = job.folder / CONFIG
    if not stored.is_file():
        raise ValueError(already_used(job.folder))
    # what is carried out is what was typed; what is stored is only compared, so that it may ask for what that asks for
    raw, typed = trust.read(stored), trust.RESOLVER.findall(OmegaConf.to_yaml(job.cfg))
    begun = _rounds(trust.resolved(raw, typed))
    with trust.resolvers(typed):
        different = difference(OmegaConf.create(raw), job.cfg)
    if different is not None:
        raise ValueError(f"another run is stored here: {different}; choose another hydra.sweep.dir")
    return replace(job, resumed=True, begun=begun)


def read_job(folder: Path, overrides: Sequence[str] = (), trusted: Sequence[str] = ()) -> Job:
    """Read the stored run of a folder, which may have been moved, and apply what may be overridden.

    Args:
        folder: the run folder.
        overrides: what was typed beside it.
        trusted: names of packages whose code the stored configuration may name.

    Raises:
        ValueError: no run is stored there, an override is not allowed, or the configuration names what neither
            ``conf/`` nor a trusted package has.

    """
    stored = folder / CONFIG
    if not stored.is_file():
        raise ValueError(
            f"{folder} holds no run to resume: {stored} is missing; give the run folder that a run printed"
        )
    raw = trust.read(stored)
    begun = _rounds(trust.resolved(raw, trusted))
    for override in [f"{CACHE}=null", *overrides]:  # a folder that is written to: only where it was typed
        _apply(raw, override)
    cfg = trust.admitted(raw, trusted, typed=[override.partition("=")[0] for override in overrides])
    OmegaConf.set_struct(cfg, True)
    return Job(cfg, folder, *stored_facts(folder), resumed=True, begun=begun)


def refuse_stored_overrides(overrides: Sequence[str], trusted: Sequence[str] = (), options: Sequence[str] = ()) -> None:
    """Refuse stored overrides that compose what a stored configuration may not name, or that are Hydra's own.

    Args:
        overrides: as they were stored.
        trusted: names of packages whose code they may name.
        options: what the reader typed beside them.

    Raises:
        ValueError: names what stands there.

    """
    for override in overrides:
        if "hydra" in override.partition("=")[0].lower():  # of its launcher, callbacks, folders, search path
            raise ValueError(f"the stored override {override[:100]!r} is of Hydra itself, which no run stores")
    trust.admitted(_compose([*overrides, *options]), trusted)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Apply one override to a configuration as it was written, or refuse it."""
    key, found, value = override.partition("=")
    if key == "logger" and found:
        raw["logger"] = _compose([f"logger={value}"])["logger"]
    elif found and (key in ("federation.rounds", CACHE) or key.startswith("trainer.")):
        *groups, last = key.split(".")
        for group in groups:
            raw = raw.setdefault(group, {})
            if not isinstance(raw, dict):
                raise ValueError(f"{override}: the stored {group} is no group of keys")
        raw[last] = _value(f"{last}={value}")
    else:
        raise ValueError(f"{override}: {ALLOWED}; the rest comes from the stored run")


def _value(override: str) -> Any:
    """Read a value as Hydra would: YAML takes 00:08:00:00 for a number.

    Raises:
        ValueError: Hydra cannot read it, in one line.

    """
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise ValueError(f"{override}: {trust.one_line_of(error)}") from error


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a configuration, of which nothing is built or resolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)))  # type: ignore[return-value]


def finished(job: Job) -> dict[str, Any] | None:
    """Summary of a folder whose run is finished with as many rounds as asked for, or None.

    A run that stopped early by itself, with fewer rounds than were asked for when it was carried out, is finished too.
    """
    path = job.folder / SUMMARY
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    asked = summary.get("rounds_asked", job.begun)  # a summary of before it was noted: what the run began with
    return summary if _rounds(job.cfg) <= max(summary["rounds"], asked) else None


def _rounds(cfg: DictConfig) -> int:
    """All rounds of a run, those of an exploration too; runs of before there were phases have theirs alone.

    Raises:
        ValueError: it does not say how many.

    """
    try:
        if "phases" not in cfg:
            return int(cfg.federation.rounds)
        return Phases.of(OmegaConf.to_container(cfg.phases, resolve=True)).total  # type: ignore[arg-type]
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise ValueError(f"the stored configuration does not say its rounds: {trust.one_line_of(error)}") from error


def open_log(folder: Path) -> None:
    """Go on writing to run.log, and show warnings, as Hydra does in a fresh run."""
    handler: logging.Handler = files.LogFile(folder / LOG, encoding="utf-8")
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.WARNING)
    for one in (handler, console):
        one.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(one)
    logging.getLogger().setLevel(logging.INFO)
