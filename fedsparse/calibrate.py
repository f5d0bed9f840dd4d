"""Calibrate only: ``python -m fedsparse.calibrate [group=option] [key=value]``, with keys of ``fedsparse.train``.

The run folder gets ``mask.safetensors``, ``mask.png`` and ``calibration.json``. To train with the mask afterwards:
``python -m fedsparse.train mask_rule=from_file mask_rule.path=<run folder>/mask.safetensors``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedsparse.core import files
from fedsparse.core.folder import CALIBRATION
from fedsparse.core.waits import waiting
from fedsparse.job.command import arrange, logging_kept, on_command_line
from fedsparse.job.config import check_alone
from fedsparse.job.resume import Job, composed, store
from fedsparse.job.runs import compose_and_run
from fedsparse.job.shipped import conf_dir
from fedsparse.job.sweep import already_used, beside_others, locked, used
from fedsparse.job.unread import check_taken

if TYPE_CHECKING:
    from fedsparse.job.parts import Assembly
    from fedsparse.preparation.calibration import Calibrated


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Calibrate as the command line does; returns the contents of ``calibration.json``, and the run folder."""
    import torchmetrics  # noqa: F401  whole, as the program that calls may use all of it

    return compose_and_run(execute_hydra, overrides)


def execute_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Calibrate with the configuration that Hydra composed."""
    hydra_cfg = HydraConfig.get()
    job = composed(cfg, hydra_cfg)
    check_alone(cfg, job.choices)
    with waiting("importing torch and Lightning", beside_others()):
        check_taken(cfg, job.choices)
    if used(job.folder):
        raise ValueError(already_used(job.folder))
    with locked(job.folder):
        store(job, hydra_cfg)
        return execute(job)


def execute(job: Job) -> dict[str, Any]:
    """Prepare head and mask as a training run does, without training.

    Raises:
        ValueError: the mask depends on an exploration, which is training.

    """
    from fedsparse.federation.exchange.ledger import Ledger  # here, so that a wrong argument is refused without torch
    from fedsparse.job.assemble import assemble
    from fedsparse.job.execute import quiet
    from fedsparse.job.prepare import prepare

    quiet()
    with waiting("data and model", beside_others()):
        assembly = assemble(job.cfg)
    ledger, began = Ledger(), time.perf_counter()
    if assembly.course.phases.explore is not None:
        raise ValueError(
            "this mask is chosen after clients have explored, which is training: python -m fedsparse.train"
        )
    found = prepare(job, assembly, assembly.module(), ledger)
    summary = figures(job, assembly, found) | ledger.figures() | {"seconds": time.perf_counter() - began}
    files.write(job.folder / CALIBRATION, json.dumps(summary, indent=2) + "\n")
    print(f"{summary['trainable_fraction']:.1%} of the weights train; the mask lies in {job.folder}")
    return summary | {"folder": str(job.folder)}


def figures(job: Job, assembly: Assembly, found: Calibrated) -> dict[str, Any]:
    """Compute the figures of the masks: densities, and overlaps between calibration rounds and between clients."""
    from fedsparse.job.summary import mean_client_overlap, sparsity_of  # here, as above

    space, mask = assembly.problem.space, found.mask
    always = space.where(assembly.method.sparsity.always_train)
    return {
        **{key: job.choices.get(key) for key in ("mask_rule", "partition", "data", "model")},
        "seed": assembly.problem.seed,
        "sparsity": sparsity_of(mask, always, space),
        "trainable_fraction": int(mask.row(space).sum()) / sum(p.numel() for p in assembly.problem.net.parameters()),
        "density_by_layer": mask.by_layer(),
        "mask_overlap_rounds": list(found.overlap),
        "mask_overlap_clients": mean_client_overlap(found, space),
    }


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> None:
    execute_hydra(cfg)


def main() -> None:
    """Entry point of the command line."""

    def body() -> None:
        arrange()
        with logging_kept():
            _hydra_main()

    on_command_line(body)


if __name__ == "__main__":
    main()
