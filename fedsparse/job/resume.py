"""Resumes a stopped run: its stored configuration, and the few keys that may change."""

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
from fedsparse.job import trust
from fedsparse.job.shipped import conf_dir
from fedsparse.job.sweep import already_used, difference, used

ALLOWED = (
    "on resume only federation.rounds, trainer.*, logger, logger.wandb.entity, calibration.cache and trust may be given"
)
CACHE, ENTITY = "calibration.cache", "logger.wandb.entity"
log = logging.getLogger("fedsparse")


@dataclass(frozen=True)
class Job:
    """A run to execute.

    Attributes:
        cfg: its configuration, without the node ``hydra``.
        folder: its run folder.
        choices: option chosen of each config group.
        group: name shared by the runs of a sweep, or None.
        resumed: whether the folder holds a run to resume.
        begun: rounds in the stored configuration of a resumed run.

    """

    cfg: DictConfig
    folder: Path
    choices: dict[str, str]
    group: str | None = None
    resumed: bool = False
    begun: int = 0


def choices_and_group(hydra_cfg: Any) -> tuple[dict[str, str], str | None]:
    """Read the chosen option of each group and the sweep's name from the node ``hydra``."""
    chosen = hydra_cfg["runtime"]["choices"].items()
    choices = {str(key): str(value) for key, value in chosen if not str(key).startswith("hydra/")}
    sweep = "MULTIRUN" in str(hydra_cfg["mode"])
    return choices, Path(str(hydra_cfg["sweep"]["dir"])).name if sweep else None


def composed(cfg: DictConfig, hydra_cfg: Any) -> Job:
    """Build the job that Hydra composed, in the run folder that it created.

    Raises:
        ValueError: a user's option has the name of a shipped one, which Hydra prefers.

    """
    choices, group = choices_and_group(hydra_cfg)
    sources = hydra_cfg["runtime"]["config_sources"]
    folders = [Path(str(source["path"])) for source in sources if source["schema"] == "file"]
    user_folders = [folder for folder in folders if folder.resolve() != conf_dir()]
    for key, option in choices.items():
        file = f"{key}/{option}.yaml"
        hidden = [folder / file for folder in user_folders if (folder / file).is_file()]
        if hidden and (conf_dir() / file).is_file():
            raise ValueError(f"{key}={option} is shipped and cannot be replaced; rename {hidden[0]}")
    return Job(cfg, Path(str(hydra_cfg["runtime"]["output_dir"])), choices, group)


def stored_choices(folder: Path) -> tuple[dict[str, str], str | None]:
    """Read the choices and the sweep's name of a stored run, as plain data, unresolved.

    Raises:
        ValueError: the file is damaged.

    """
    try:
        return choices_and_group(yaml_of(folder / HYDRA)["hydra"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: .hydra/hydra.yaml cannot be read ({type(error).__name__}: {error})") from error


def store(job: Job, hydra_cfg: Any) -> None:
    """Write the configuration into the run folder in Hydra's files, each atomically."""
    hydra_node = OmegaConf.to_container(hydra_cfg, enum_to_str=True)
    assert isinstance(hydra_node, dict)
    hydra_node["sweep"]["dir"] = str(hydra_cfg.sweep.dir)  # resolved, since ${now:} would name another sweep on resume
    (job.folder / CONFIG).parent.mkdir(exist_ok=True)
    stored = {HYDRA: OmegaConf.create({"hydra": hydra_node}), CONFIG: job.cfg, OVERRIDES: hydra_cfg.overrides.task}
    for name, node in stored.items():
        files.write(job.folder / name, OmegaConf.to_yaml(node))


def continued(job: Job) -> Job:
    """Compare a cell of a sweep with its folder; returns the job, resumed if the folder holds the same run.

    Raises:
        ValueError: the folder holds another run; it is not changed.

    """
    if not used(job.folder):
        return job
    stored = job.folder / CONFIG
    if not stored.is_file():
        raise ValueError(already_used(job.folder))
    # the job runs as typed; the stored configuration is only compared, so it may use the job's resolvers
    raw, resolver_names = trust.read(stored), trust.RESOLVER.findall(OmegaConf.to_yaml(job.cfg))
    begun = _rounds(trust.resolved(raw, resolver_names))
    with trust.resolvers(resolver_names):
        different = difference(OmegaConf.create(raw), job.cfg)
    if different is not None:
        raise ValueError(f"another run is stored here: {different}; choose another hydra.sweep.dir")
    return replace(job, resumed=True, begun=begun)


def read_job(folder: Path, overrides: Sequence[str] = (), trusted: Sequence[str] = ()) -> Job:
    """Read the stored run of a folder, which may have been moved, and apply overrides.

    Args:
        folder: the run folder.
        overrides: of the keys that may change.
        trusted: packages whose code the stored configuration may name.

    Raises:
        ValueError: no run is stored there, an override is not allowed, or the configuration names a target of neither
            ``conf/`` nor a trusted package.

    """
    stored = folder / CONFIG
    if not stored.is_file():
        raise ValueError(
            f"{folder} holds no run to resume: {stored} is missing; give the run folder that a run printed"
        )
    raw = trust.read(stored)
    begun = _rounds(trust.resolved(raw, trusted))
    for override in [f"{CACHE}=null", *overrides]:  # the stored cache folder is not written to, only a typed one
        _apply(raw, override)
    typed = [override.partition("=")[0] for override in overrides]
    cfg = trust.admitted(raw, trusted, typed)
    without_entity(cfg, typed)
    OmegaConf.set_struct(cfg, True)
    return Job(cfg, folder, *stored_choices(folder), resumed=True, begun=begun)


def without_entity(cfg: DictConfig, typed: Sequence[str] = ()) -> None:
    """Take W&B's entities out of a stored configuration, in place: a folder of a stranger could name a stranger's.

    Args:
        cfg: the configuration.
        typed: keys that the reader set, which stay.

    """
    for name, node in (cfg.get("logger") or {}).items():
        key = f"logger.{name!s}.entity"
        if isinstance(node, DictConfig) and node.get("entity") is not None and not trust.covers(typed, key):
            if not node.get("offline"):
                log.warning("the stored %s=%s is not used, type it to log there", key, node.entity)
            node.entity = None


def refuse_stored_overrides(overrides: Sequence[str], trusted: Sequence[str] = (), options: Sequence[str] = ()) -> None:
    """Refuse stored overrides of Hydra's keys, or whose configuration has untrusted targets.

    Args:
        overrides: as stored.
        trusted: packages whose code they may name.
        options: the reader's own overrides.

    Raises:
        ValueError: one line with the override or target.

    """
    for override in overrides:
        if "hydra" in override.partition("=")[0].lower():  # launcher, callbacks, folders or search path
            raise ValueError(f"the stored override {override[:100]!r} is of Hydra itself, which no run stores")
    trust.admitted(_compose([*overrides, *options]), trusted)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Apply one override to an unresolved configuration, in place.

    Raises:
        ValueError: the key may not change.

    """
    key, found, value = override.partition("=")
    if key == "logger" and found:
        raw["logger"] = _compose([f"logger={value}"])["logger"]
    elif key == ENTITY and "wandb" not in (raw.get("logger") or ()):
        raise ValueError(f"{override}: this run has no logger=wandb")
    elif found and (key in ("federation.rounds", CACHE, ENTITY) or key.startswith("trainer.")):
        *groups, last = key.split(".")
        for group in groups:
            raw = raw.setdefault(group, {})
            if not isinstance(raw, dict):
                raise ValueError(f"{override}: the stored {group} is no group of keys")
        raw[last] = _value(f"{last}={value}")
    else:
        raise ValueError(f"{override}: {ALLOWED}; the rest comes from the stored run")


def _value(override: str) -> Any:
    """Parse a value by Hydra's grammar; YAML would read 00:08:00:00 as a number.

    Raises:
        ValueError: Hydra cannot parse it; one line.

    """
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise ValueError(f"{override}: {trust.one_line_of(error)}") from error


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a configuration, unresolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)))  # type: ignore[return-value]


def finished(job: Job) -> dict[str, Any] | None:
    """Read the summary of a run that is finished for the configured rounds, else None.

    A run that early stopping ended is finished too, unless more rounds are configured than when it ran.
    """
    path = job.folder / SUMMARY
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    asked = summary.get("rounds_asked", job.begun)  # older summaries lack it: the stored rounds
    return summary if _rounds(job.cfg) <= max(summary["rounds"], asked) else None


def _rounds(cfg: DictConfig) -> int:
    """Count all rounds of a run, those of an exploration too; older stored runs have no phases.

    Raises:
        ValueError: the number of rounds is missing or cannot be read.

    """
    try:
        if "phases" not in cfg:
            return int(cfg.federation.rounds)
        from fedsparse.federation.phases import Phases  # here, so that a new run is composed without torch

        return Phases.of(OmegaConf.to_container(cfg.phases, resolve=True)).total  # type: ignore[arg-type]
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise ValueError(f"the stored configuration does not say its rounds: {trust.one_line_of(error)}") from error


def open_log(folder: Path) -> None:
    """Append to run.log, and print warnings, as Hydra configures it for a new run."""
    handler: logging.Handler = files.LogFile(folder / LOG, encoding="utf-8")
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.WARNING)
    for one in (handler, console):
        one.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(one)
    logging.getLogger().setLevel(logging.INFO)
