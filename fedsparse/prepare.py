"""The part of a run before its first round, and what it leaves in the run folder: partition, head, masks."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from fedsparse import build, results, trust
from fedsparse.analysis.mask_plot import mask_figure
from fedsparse.core import files
from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.core.seeding import Purpose
from fedsparse.core.space import ParamSpace
from fedsparse.devices import build_device
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.masking import NOTHING
from fedsparse.federation.phases import Phases
from fedsparse.masks import Exploration, Mask, MaskRule, overlaps
from fedsparse.masks.bitmaps import masks_of
from fedsparse.masks.rules import FromFile
from fedsparse.preparation.cache import Cache, source_of
from fedsparse.preparation.calibration import (
    Calibrated,
    Calibration,
    CalibrationJob,
    calibrate,
    calibrate_clients,
    observe,
)
from fedsparse.preparation.head import Head, prepare_head
from fedsparse.preparation.preparation import Preparation
from fedsparse.resume import Job
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.trial import try_out

log = logging.getLogger("fedsparse")
MASK, CLIENT_MASKS = "mask.safetensors", "client_masks.safetensors"
DEVIATION = "guidance.safetensors"  # the name in run folders of every version
PICTURE = "mask.png"
OVERLAP = "overlap_of_rounds"  # in the mask file's metadata, so that a resumed run reports it too


def prepare(job: Job, federation: build.Parts, module: ClientModule, ledger: Ledger) -> Calibrated:
    """Go through the phases that come before the first round, and write what they found into the run folder."""
    with made_in(dtype_of(job.cfg.trainer.precision)):
        return _prepare(job, federation, module, ledger)


def _prepare(job: Job, federation: build.Parts, module: ClientModule, ledger: Ledger) -> Calibrated:
    phases, rule = federation.phases, instantiate(job.cfg.mask_rule)
    check_phases(phases, rule, job.cfg)
    if job.cfg.pictures:
        results.save_partition(federation, job.choices.get("partition", ""), job.folder / "partition.png")
    preparation = build_preparation(job.cfg, federation, ledger, module)
    try_out(module, *preparation.take(federation.dataset.train, np.arange(min(2, len(federation.dataset.train.y)))))
    if phases.has("head"):
        with shown("head"):
            start_head(job.cfg, preparation, phases.prepares("head"))
    with shown("calibrate") if phases.has("calibrate") else nullcontext():
        found = choose_mask(job.cfg, preparation, rule, phases)
    if phases.explore is not None:
        return found
    if isinstance(rule, FromFile):
        _check_given(job, rule, found.mask)
    mask = record(job, found.mask, found.bitmaps, found.overlap)
    draw(job, mask)
    return replace(found, mask=mask)


def check_phases(phases: Phases, rule: MaskRule, cfg: DictConfig) -> None:
    """Refuse phases and a mask rule that do not go together.

    Raises:
        ValueError: one line that says what to set.

    """
    name, explore = type(rule).__name__, phases.explore
    if rule.need(Exploration) and (explore is None or not explore.informs_mask):
        raise ValueError(f"the mask rule {name} chooses by an exploration that informs it: set phases=explore")
    if rule.calibration and not phases.has("calibrate"):
        raise ValueError(f"the mask rule {name} needs the phase calibrate, which phases leaves out")
    if explore is not None and not rule.need(Exploration) and not explore.updates_model:
        raise ValueError(
            f"the mask rule {name} takes nothing from an exploration: set phases=default, or explore.keep_model=true "
            "for a head start"
        )
    if not isinstance(save := cfg.explore.get("save", False), bool):
        raise ValueError(f"explore.save is {save!r}; it must be true or false")
    if explore is None and cfg.explore.keep_model:
        raise ValueError("explore.keep_model=true needs an exploration, and there is none: set phases=explore")
    renewed = cfg.sparsity.get("schedule") or cfg.sparsity.get("renew_every")
    if renewed and isinstance(rule, FromFile):
        raise ValueError(
            "mask_rule=from_file takes the mask of the file for the whole run: leave sparsity.schedule and "
            "sparsity.renew_every null"
        )
    if (renewed or explore is not None) and build.own_masks(cfg):
        raise ValueError("masks that change need mask.owner=global")
    if renewed and cfg.federation.store == "file":
        raise ValueError("masks that are chosen anew need federation.store=memory: rows of a file have one length")
    if cfg.sparsity.mode == "prune" and build.own_masks(cfg):
        raise ValueError("sparsity.mode=prune needs mask.owner=global: what is zero is zero for all")


@contextmanager
def shown(phase: str) -> Iterator[None]:
    """Say on a terminal, and in run.log, that a phase of the preparation runs."""
    console, began = Console(file=sys.stderr), time.perf_counter()
    with console.status(phase) if console.is_terminal else nullcontext():
        yield
    log.info("phase %s: %.1f s", phase, time.perf_counter() - began)


def record(job: Job, chosen: Mask, bitmaps: Tensor | None = None, overlap: Sequence[float] = ()) -> Mask:
    """Write a mask into the run folder; returns it with the metadata of the file."""
    rule = job.choices.get("mask_rule", chosen.metadata["rule"])
    mask = Mask(chosen.tensors, chosen.metadata | {"rule": rule, OVERLAP: json.dumps(overlap)})
    if mask.density == 0:
        raise ValueError(NOTHING)
    write(job.folder, mask, torch.zeros(0) if bitmaps is None else bitmaps)
    return mask


def draw(job: Job, mask: Mask) -> None:
    """Draw a mask into the run folder, if pictures are wanted."""
    if job.cfg.pictures:
        title = f"mask rule {mask.metadata['rule']}, {mask.density:.1%} of the weights train"
        results.picture(job.folder / PICTURE, lambda: mask_figure(mask, title=title))


def build_preparation(cfg: DictConfig, federation: build.Parts, ledger: Ledger, module: ClientModule) -> Preparation:
    """Gather what head and mask are prepared on, and move the network to its device."""
    device = build_device(cfg)
    return Preparation(
        net=federation.net.to(device),
        space=federation.space,
        dataset=federation.dataset,
        parts=federation.parts,
        sample=federation.sample,
        losses=module.losses,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        ledger=ledger,
        model_length=federation.model_length,
        inputs=federation.inputs,
        device=device,
    )


def start_head(cfg: DictConfig, preparation: Preparation, steps: int) -> None:
    """Prepare the head in so many steps: every run of a seed starts from the same one, whatever its mask rule."""
    head, lr = Head(**cfg.head), cfg.calibration.head_lr
    if head.init == "random":
        return
    read = {**_plain(cfg, "head"), "steps": steps, "lr": lr, "sampled": _sampled(preparation, Purpose.HEAD, steps)}
    Cache(cfg.calibration.cache).head(
        preparation,
        read | {"client": _plain(cfg, "client")},
        cfg.model.head,
        lambda: prepare_head(preparation, head, cfg.model.head, steps, lr),
    )


def choose_mask(cfg: DictConfig, preparation: Preparation, rule: MaskRule, phases: Phases) -> Calibrated:
    """Choose what trains in the first round: calibrate, or take the masks of the same calibration.

    Where clients explore first, everything trains until they have.
    """
    calibration = Calibration(**{**cfg.calibration, "rounds": phases.prepares("calibrate")})
    job = CalibrationJob(rule, build.build_sparsity(cfg, preparation.net), calibration, cfg.model.head)
    if phases.explore is not None:
        everything = Mask.of(preparation.space, torch.ones(preparation.space.size, dtype=torch.bool), rule="Dense")
        return Calibrated(everything, observed=observe(preparation, job))
    choose = calibrate_clients if build.own_masks(cfg) else calibrate
    if not job.sparsity.constant or not rule.calibration:  # a later choice needs what was observed
        return choose(preparation, job)
    read = {key: _plain(cfg, key) for key in ("mask_rule", "sparsity", "calibration", "mask")}
    del read["calibration"]["cache"]
    read["calibration"]["rounds"] = calibration.rounds
    read["sampled"] = _sampled(preparation, Purpose.CALIBRATION, calibration.rounds)
    read |= {"client": _plain(cfg, "client"), "rule": source_of(rule)}
    return Cache(calibration.cache).calibrated(preparation, read, lambda: choose(preparation, job))


def _plain(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.to_container(cfg[key], resolve=True)


def _sampled(preparation: Preparation, purpose: Purpose, rounds: int) -> list[list[int]]:
    """Who takes part in each round of a preparation."""
    return [list(preparation.sample(round, purpose)) for round in range(rounds)]


def write(folder: Path, mask: Mask, bitmaps: torch.Tensor) -> None:
    """Write the masks, and the density of each layer into the log."""
    mask.save(folder / MASK)
    if len(bitmaps):
        files.write(folder / CLIENT_MASKS, save({"bitmaps": bitmaps}, dict(mask.metadata)))
    for layer, density in mask.by_layer().items():
        log.info("density %-30s %.4f", layer, density)


def save_deviation(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Write what exploring clients found, by tensor, beside the masks: ``explore.save=true`` asks for it."""
    files.write(folder / DEVIATION, save({name: part.contiguous() for name, part in found.items()}))


def sparsity_of(mask: Mask, always: torch.Tensor, space: ParamSpace) -> float:
    """Fraction of the counted coordinates that does not train: as the mask's maker named it, else counted.

    Args:
        mask: the mask.
        always: bool (P,), coordinates that are not counted.
        space: its space.

    """
    if "ratio" in mask.metadata:
        return float(mask.metadata["ratio"])
    counted = mask.row(space)[~always]
    return 1 - int(counted.sum()) / max(1, len(counted))


def mean_client_overlap(found: Calibrated, space: ParamSpace) -> float | None:
    """Mean Jaccard index over the pairs of clients with a mask of their own; None with one mask for all."""
    held = found.bitmaps[(found.bitmaps > 0).any(1)] if len(found.bitmaps) else found.bitmaps
    if len(held) < 2:
        return None
    matrix = overlaps(masks_of(held, space))
    pairs = torch.triu_indices(len(held), len(held), 1)
    return float(matrix[pairs[0], pairs[1]].mean())


def _check_given(job: Job, rule: FromFile, mask: Mask) -> None:
    """Refuse another sparsity beside that of a mask file: only one of them could be meant.

    Raises:
        ValueError: names the file's ratio and the one that was typed.

    """
    typed = [o for o in trust.overrides(job.folder) if o.startswith("sparsity")]
    ratio = mask.metadata.get("ratio")
    if typed and ratio is not None and float(ratio) != job.cfg.sparsity.get("ratio"):
        raise ValueError(
            f"mask_rule=from_file sets the sparsity: {rule.path} has sparsity.ratio={ratio}; "
            f"leave out {' '.join(typed)}"
        )
