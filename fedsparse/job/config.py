"""Checks of a configuration's values and of its run folder, and the resolvers of its YAML files."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from fedsparse.core.checks import check_choice, check_flag, check_number, check_positive, check_share
from fedsparse.core.folder import LOCK, LOG, PARTITION, SUMMARY
from fedsparse.core.precisions import PRECISIONS
from fedsparse.job.budget import rounds_for_steps
from fedsparse.job.limits import check_trainer
from fedsparse.job.resume import choices_and_group
from fedsparse.job.sweep import already_used, cell_name, used
from fedsparse.job.unread import check_keys, check_taken

BEFORE_A_RUN = {".hydra", LOCK, LOG, PARTITION}
COUNTS = (
    "federation.num_clients",
    "federation.rounds",
    "federation.eval_every",
    "federation.checkpoint_every",
    "data.batch_size",
    "calibration.batches",
    "calibration.rounds",
)
OPTIONAL_COUNTS = ("federation.local_steps", "federation.local_epochs")
EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"
MOST = 2**31 - 1  # of a count; larger ones are mistyped
LARGEST_SEED = 2**64 - 1  # the limit of torch's generators
POSITIVE = ("optimizer.lr", "server.lr", "calibration.head_lr")


class RunFolderUsed(SystemExit):
    """A run folder already holds a run. It derives from SystemExit because Hydra catches a callback's Exceptions."""


class QuietReturn(JobReturn):
    """A job's result that raises the job's exception without a line of Hydra's before it."""

    @property  # type: ignore[misc]
    def return_value(self) -> Any:
        """Return value of the task; raises the task's exception."""
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return super().return_value


class FreshRunFolder(Callback):
    """Refuses a used folder for a single run before it is written to; says a sweep's cells, and its report's command.

    The folder of a run that failed before its first round is removed.

    Args:
        refuse: whether a used folder is refused.

    """

    def __init__(self, refuse: bool = True) -> None:
        self.refuse = refuse
        self.made: list[Path] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a single run."""
        folder = Path(config.hydra.run.dir).absolute()
        if self.refuse:
            refuse_used(folder)
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep Hydra from printing a job's error, and remove the folders of a run without a first round."""
        job_return.__class__ = QuietReturn
        if job_return.status != JobStatus.FAILED or getattr(job_return._return_value, "keep", False):
            return
        folder = Path(config.hydra.runtime.output_dir)
        existed = bool(self.made) and folder not in self.made
        if existed or not {path.name for path in folder.iterdir()} <= BEFORE_A_RUN:
            return
        shutil.rmtree(folder, ignore_errors=True)
        for above in self.made[1:]:
            with suppress(OSError):  # it is not empty: another run lies there
                above.rmdir()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name cells by all swept keys, also those left out of names by default, and print the number of cells."""
        parsed = _sweep_overrides(config)
        swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
        excluded = [key for key in OmegaConf.select(config, EXCLUDED) if key not in swept]
        with read_write(config.hydra.overrides.hydra):
            config.hydra.overrides.hydra.append(f"{EXCLUDED}=[{','.join(excluded)}]")
        subdir = OmegaConf.to_container(config.hydra.sweep)["subdir"]  # type: ignore[index, call-overload]
        if config.hydra.sweeper._target_.endswith("BasicSweeper") and subdir.startswith("${cell:"):
            cells = [cell for batch in BasicSweeper.split_arguments(parsed, None) for cell in batch]
            print(_how_far(Path(config.hydra.sweep.dir), [cell_name(cell, excluded) for cell in cells]), flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the command of the sweep's report; calibrations have none."""
        sweep = Path(config.hydra.sweep.dir)
        if any(sweep.rglob(SUMMARY)):
            print(f"report: python -m fedsparse.report {shlex.quote(str(sweep))}", flush=True)


def _sweep_overrides(config: DictConfig) -> list[Override]:
    """Parse the overrides of a sweep: the sweeper's parameters, then the command line's."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*params, *config.hydra.overrides.task])


def _how_far(sweep: Path, names: Sequence[str]) -> str:
    """Write the number of cells, and of those that have a summary.

    >>> _how_far(Path("runs/grid"), ["seed-0", "seed-1"])
    '2 cells in runs/grid'
    """
    done = sum((sweep / name / SUMMARY).is_file() for name in names)
    cells = f"{len(names)} {'cell' if len(names) == 1 else 'cells'} in {sweep}"
    return f"{cells}, {done} finished before" if done else cells


def refuse_used(folder: Path) -> None:
    """Exit if a folder holds a run.

    Raises:
        RunFolderUsed: one line that names the folder and how to continue.

    """
    if used(folder):
        raise RunFolderUsed(f"fedsparse: {already_used(folder)}")


def wandb_offline() -> bool:
    """Whether Weights & Biases logs offline: WANDB_MODE is set and not online, or no API key is found."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "online"  # Lightning sets "dryrun", which later runs of a sweep read
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        return not any("wandb" in host for host in netrc().hosts)
    except (OSError, NetrcParseError):
        return True


def timm_head(name: str) -> str:
    """Pattern of the head's parameters in one of timm's models, such as ``fc.*``."""
    from fedsparse.models.pretrained import head_pattern  # timm costs a second to import

    return head_pattern(name)


def timm_size(name: str, img_size: int | None) -> int:
    """Side of the images that one of timm's models takes, for the key ``model.image_side``."""
    from fedsparse.models.pretrained import image_size  # as above

    return image_size(name) if img_size is None else img_size


def whole_quotient(total: int, parts: int | None) -> int:
    """Divide and round half up, to 1 or more; the total where ``parts`` is 0 or None.

    >>> whole_quotient(800, 16), whole_quotient(800, 3)
    (50, 267)
    """
    return max(1, math.floor(total / parts + 0.5)) if parts else total


def register_resolvers() -> None:
    """Register the resolvers that the YAML files use as ``${name:arguments}``."""
    OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
    OmegaConf.register_new_resolver("cell", cell_name, replace=True)
    OmegaConf.register_new_resolver("timm_head", timm_head, replace=True)
    OmegaConf.register_new_resolver("timm_size", timm_size, replace=True)
    OmegaConf.register_new_resolver("whole_quotient", whole_quotient, replace=True)
    OmegaConf.register_new_resolver("rounds_for_steps", rounds_for_steps, replace=True)


def check(cfg: DictConfig, choices: Mapping[str, str | None] | None = None) -> None:
    """Check keys and plain numbers of a configuration; the constructors of its parts check the rest.

    Args:
        cfg: the configuration.
        choices: option chosen of each group; by default the shipped defaults.

    Raises:
        ValueError: one line with the key, its value and the valid values.

    """
    check_alone(cfg, choices)
    check_taken(cfg, choices or {})


def check_alone(cfg: DictConfig, choices: Mapping[str, str | None] | None = None) -> None:
    """Check what the configuration alone shows, without an import of torch, which ``check_taken`` needs.

    Args:
        cfg: the configuration.
        choices: option chosen of each group; by default the shipped defaults.

    Raises:
        ValueError: one line with the key, its value and the valid values.

    """
    check_keys(cfg, choices or {})
    check_trainer(cfg.trainer)
    for key in COUNTS:
        _check_count(key, OmegaConf.select(cfg, key))
    for key in OPTIONAL_COUNTS:
        _check_count(key, OmegaConf.select(cfg, key), null=True)
    _check_count("federation.cohort", cfg.federation.cohort, word="auto", null=True)
    _check_count("model.cohort", cfg.model.cohort, word="auto")
    check_flag("federation.compile", cfg.federation.get("compile", False))
    check_flag("federation.graph", cfg.federation.get("graph", False))
    check_flag("federation.tf32", cfg.federation.get("tf32", False))
    check_flag("federation.channels_last", cfg.federation.get("channels_last", False))
    if (deterministic := cfg.trainer.get("deterministic")) not in (None, "warn"):
        check_flag("trainer.deterministic", deterministic)
    for key in POSITIVE:
        check_positive(key, OmegaConf.select(cfg, key))
    check_number("optimizer.clip_norm", cfg.optimizer.clip_norm, above=0, null=True)
    check_flag("pictures", cfg.pictures)
    check_flag("logger.wandb.log_model", OmegaConf.select(cfg, "logger.wandb.log_model", default=False))
    check_number("seed", cfg.seed, whole=True, least=0, most=LARGEST_SEED)
    _check_server(cfg.server)
    _check_precision(cfg.trainer.precision)


def check_values(parsed: list[Override]) -> None:
    """Check each value of what is swept once, beside the first values of the others.

    Args:
        parsed: overrides of a sweep.

    Raises:
        ValueError: one line with the first key or value that is wrong.

    """
    seen = set[str]()
    for cell in BasicSweeper.split_arguments(parsed, None)[0]:
        if not seen.issuperset(cell):
            cfg = compose("train", list(cell), return_hydra_config=True)
            choices, _ = choices_and_group(cfg.hydra)
            check(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), choices)
            seen.update(cell)


def _check_count(key: str, value: Any, **others: Any) -> None:
    """Refuse values other than counts from 1 to MOST; the message names the limit only where it is exceeded."""
    check_number(key, value, whole=True, least=1, **others)
    check_number(key, value, whole=True, least=1, most=MOST, **others)


def _check_server(options: DictConfig) -> None:
    """Refuse numbers that torch's optimizers do not check."""
    for key, value in options.items():
        if isinstance(value, float | int) and not isinstance(value, bool):
            check_number(f"server.{key!s}", value)
    if "momentum" in options:
        check_share("server.momentum", options.momentum)


def _check_precision(value: Any) -> None:
    """Refuse values other than Lightning's precisions; old names such as 16 would train float32."""
    meant = {"16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true", "32": "32-true"}.get(str(value), "")
    if meant:
        raise ValueError(f"trainer.precision is {value!r}; write trainer.precision={meant}")
    check_choice("trainer.precision", value, *PRECISIONS)


register_resolvers()  # on import, because the workers of a sweep do not call main()
