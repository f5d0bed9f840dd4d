"""Allowed options of Lightning's Trainer: those that do not change a round or an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

# they do not change results, or concern the machine
ALLOWED = (
    *("accelerator", "devices", "num_nodes", "precision", "max_time"),
    *("deterministic", "benchmark", "inference_mode", "detect_anomaly"),
    *("profiler", "default_root_dir", "enable_autolog_hparams", "model_registry"),
)
_ROUNDS, _EVALUATED = "set federation.rounds", "set federation.eval_every or federation.eval_share"
INSTEAD = {
    **dict.fromkeys(("max_epochs", "max_steps", "fast_dev_run"), _ROUNDS),
    **dict.fromkeys(("min_epochs", "min_steps"), "set callbacks=early_stopping callbacks.early_stopping.patience"),
    "limit_train_batches": "set federation.clients_per_round, or federation.local_steps",
    "overfit_batches": "set federation.clients_per_round, or federation.local_steps",
    **dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), _EVALUATED),
    **dict.fromkeys(("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps"), _EVALUATED),
    "accumulate_grad_batches": "set data.batch_size",
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm"), "set optimizer.clip_norm"),
    "logger": "set logger=csv, tensorboard or wandb, or add to the group logger",
    "callbacks": "add to the group callbacks",
    "enable_checkpointing": "set federation.checkpoint_every",
    "log_every_n_steps": "every round is logged",
    "enable_progress_bar": "the bar is fedsparse's own, and no terminal gets one",
    "enable_model_summary": "summary.json says how many parameters there are",
    "barebones": "set logger=csv pictures=false",
    "sync_batchnorm": "set federation.buffers",
    "strategy": "set trainer.devices, and trainer.num_nodes",
    "plugins": "set trainer.precision, trainer.devices",
    "use_distributed_sampler": "a round's clients are dealt to the processes by fedsparse",
    "reload_dataloaders_every_n_epochs": "every round has its own clients",
}


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse keys of ``trainer`` that would change a round, or that fedsparse sets.

    Raises:
        ValueError: one line with the key, and the option to set instead.

    """
    custom = options.get("_target_") != "lightning.Trainer"
    for key in map(str, options):
        if key in INSTEAD:
            raise ValueError(f"trainer.{key} is not to be set: {INSTEAD[key]}")
        if not (custom or key.startswith("_") or key in ALLOWED):
            raise ValueError(f"there is no key trainer.{key}; there are {', '.join(sorted(ALLOWED))}")
    seconds_of(options.get("max_time"))


def seconds_of(limit: Any) -> float | None:
    """Convert ``trainer.max_time`` to seconds: DD:HH:MM:SS, or a mapping such as {hours: 3}; None is no limit.

    Raises:
        ValueError: it is neither.

    >>> seconds_of("00:01:00:05"), seconds_of({"hours": 2})
    (3605.0, 7200.0)
    """
    if limit is None:
        return None
    if isinstance(limit, str) and (found := re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", limit.strip())):
        limit = dict(zip(("days", "hours", "minutes", "seconds"), map(int, found.groups()), strict=True))
    try:
        return timedelta(**limit).total_seconds()
    except (TypeError, OverflowError):
        raise ValueError(
            f"trainer.max_time is {limit!r}; it must be days:hours:minutes:seconds, such as 00:08:00:00"
        ) from None
