"""The configuration: where it lives, what it may hold, and what a run may write to."""

from __future__ import annotations

import math
import os
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

PACKAGES = ("fedsparse", "torch", "torchvision", "torchmetrics", "lightning", "timm", "transformers", "peft")
COUNTS = (
    "federation.num_clients",
    "federation.rounds",
    "federation.cohort",
    "federation.eval_every",
    "federation.checkpoint_every",
    "data.batch_size",
    "calibration.batches",
    "calibration.rounds",
)
OPTIONAL_COUNTS = ("federation.local_steps", "federation.local_epochs")
POSITIVE = ("optimizer.lr", "server.lr", "calibration.head_lr")


class RunFolderUsed(SystemExit):
    """A run folder already holds a run; derived from SystemExit because Hydra swallows a callback's exceptions."""


class FreshRunFolder(Callback):
    """Refuses a run folder that holds a run, before Hydra writes into it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a single run."""
        refuse_used(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folders of a sweep."""
        sweep = Path(config.hydra.sweep.dir)
        for folder in sorted(sweep.iterdir()) if sweep.is_dir() else ():
            refuse_used(folder)


def refuse_used(folder: Path) -> None:
    """Exit if a folder holds a run.

    Raises:
        RunFolderUsed: one line that names the folder and the ways on.

    """
    if any((folder / name).exists() for name in ("summary.json", "metrics.csv", "checkpoints")):
        raise RunFolderUsed(
            f"fedsparse: {folder} already holds a run; continue it with resume={folder}, or choose another folder"
        )


def conf_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def wandb_offline() -> bool:
    """Whether no Weights & Biases key is present and nobody asked for a mode."""
    if os.environ.get("WANDB_MODE"):
        return (
            os.environ["WANDB_MODE"] != "online"
        )  # Lightning itself sets "dryrun", for the next run of a sweep to find
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        return not any("wandb" in host for host in netrc().hosts)
    except (OSError, NetrcParseError):
        return True


def register_resolvers() -> None:
    """Make ``${wandb_offline:}`` known to OmegaConf."""
    OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)


def check(cfg: DictConfig) -> None:
    """Check the plain numbers of a configuration; parts with more to say check themselves when they are built.

    Raises:
        ValueError: one line that names the key, its value and what it may be.

    """
    _check_keys(cfg)
    for key in COUNTS:
        _check_count(key, OmegaConf.select(cfg, key))
    for key in OPTIONAL_COUNTS:
        if OmegaConf.select(cfg, key) is not None:
            _check_count(key, OmegaConf.select(cfg, key))
    for key in POSITIVE:
        _check_positive(key, OmegaConf.select(cfg, key))
    if cfg.optimizer.clip_norm is not None:
        _check_positive("optimizer.clip_norm", cfg.optimizer.clip_norm)
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ValueError(f"seed is {cfg.seed!r}; it must be a whole number of 0 or more")
    if str(cfg.trainer.precision).endswith("-true") and str(cfg.trainer.precision) != "32-true":
        raise ValueError(f"trainer.precision={cfg.trainer.precision} cannot hold the clients' rows; use bf16-mixed")


def _check_keys(cfg: DictConfig) -> None:
    """Refuse keys that nothing would read: Hydra lets ``+key=value`` add any."""
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    known = {*groups, "seed", "client", "resume"}
    unknown = [str(key) for key in cfg if str(key) not in known]
    for group in ("federation", "calibration"):
        default = OmegaConf.load(conf_dir() / group / "default.yaml")
        unknown += [f"{group}.{key}" for key in cfg[group] if key not in default]
    if unknown:
        raise ValueError(f"there is no key {', '.join(unknown)}; --cfg job lists all keys with their values")


def _check_count(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a whole number of 1 or more")


def _check_positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} is {value!r}; it must be a finite number above 0")


def refuse_foreign_targets(node: Any) -> None:
    """Refuse a stored configuration that would call code outside the known packages.

    Args:
        node: a resolved container of dicts and lists.

    Raises:
        ValueError: names the first ``_target_`` outside them.

    """
    if isinstance(node, dict):
        target = str(node.get("_target_", "fedsparse"))
        if target.split(".")[0] not in PACKAGES:
            raise ValueError(f"the stored config names _target_: {target}, which is not of {', '.join(PACKAGES)}")
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            refuse_foreign_targets(value)
