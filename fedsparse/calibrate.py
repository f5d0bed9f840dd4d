"""Calibrate alone: ``python -m fedsparse.calibrate [group=option] [key=value]``, with the keys of ``fedsparse.train``.

The run folder gets ``mask.safetensors``, ``mask.png`` and ``calibration.json``. To train with the mask afterwards:
``python -m fedsparse.train mask_rule=from_file mask_rule.path=<run folder>/mask.safetensors``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedsparse import build, train
from fedsparse.config import check
from fedsparse.core import files
from fedsparse.execute import quiet
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.preparation.calibration import Calibrated
from fedsparse.prepare import mean_client_overlap, prepare, sparsity_of
from fedsparse.resume import Job, composed, store
from fedsparse.shipped import conf_dir
from fedsparse.sweep import CALIBRATION, already_used, held, used


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Calibrate as the command line does; returns what ``calibration.json`` holds, and the folder."""
    return train.compose_and_run(execute_hydra, overrides)


def execute_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Calibrate with the configuration that Hydra composed."""
    hydra_cfg = HydraConfig.get()
    job = composed(cfg, hydra_cfg)
    check(cfg, job.choices)
    if used(job.folder):
        raise ValueError(already_used(job.folder))
    with held(job.folder):
        store(job, hydra_cfg)
        return execute(job)


def execute(job: Job) -> dict[str, Any]:
    """Prepare head and mask as a training run does, and stop there."""
    quiet()
    federation, ledger, began = build.build_federation(job.cfg), Ledger(), time.perf_counter()
    if federation.phases.explore is not None:
        raise ValueError(
            "this mask is chosen after clients have explored, which is training: python -m fedsparse.train"
        )
    found = prepare(job, federation, build.build_module(job.cfg, federation), ledger)
    facts = figures(job, federation, found) | ledger.figures() | {"seconds": time.perf_counter() - began}
    files.write(job.folder / CALIBRATION, json.dumps(facts, indent=2) + "\n")
    print(f"{facts['trainable_fraction']:.1%} of the weights train; the mask lies in {job.folder}")
    return facts | {"folder": str(job.folder)}


def figures(job: Job, federation: build.Parts, found: Calibrated) -> dict[str, Any]:
    """Gather what is known of the masks: densities, and overlaps with those of earlier rounds and between clients."""
    space, mask = federation.space, found.mask
    always = space.where(job.cfg.sparsity.always_train)
    return {
        **{key: job.choices.get(key) for key in ("mask_rule", "partition", "data", "model")},
        "seed": job.cfg.seed,
        "sparsity": sparsity_of(mask, always, space),
        "trainable_fraction": int(mask.row(space).sum()) / sum(p.numel() for p in federation.net.parameters()),
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
        train.arrange()
        _hydra_main()

    train.on_command_line(body)


if __name__ == "__main__":
    main()
