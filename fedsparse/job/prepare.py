"""Prepares a run before its first round: partition figure, head, masks, and their files in the run folder."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fedsparse.core import files
from fedsparse.core.folder import CLIENT_MASKS, DEVIATION, MASK, MASK_PICTURE, PARTITION
from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.core.seeding import Purpose
from fedsparse.core.waits import advance, waiting
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.masking import NOTHING
from fedsparse.federation.ranks import rank_masks
from fedsparse.job import trust
from fedsparse.job.parts import Assembly, Problem
from fedsparse.job.resume import Job
from fedsparse.job.sweep import beside_others
from fedsparse.job.trial import try_out
from fedsparse.masks import Mask
from fedsparse.masks.bitmaps import pack
from fedsparse.masks.rules import FromFile
from fedsparse.preparation.cache import Cache, source_of
from fedsparse.preparation.calibration import Calibrated, CalibrationJob, calibrate, calibrate_clients, observe
from fedsparse.preparation.head import prepare_head
from fedsparse.preparation.preparation import Answer, Gather, Preparation, in_process
from fedsparse.preparation.tasks import ClientTask
from fedsparse.simulation.devices import device_of
from fedsparse.simulation.module import ClientModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("fedsparse")
OVERLAP = "overlap_of_rounds"  # in the mask file's metadata, so that a resumed run reports it


def prepare(
    job: Job, assembly: Assembly, module: ClientModule, ledger: Ledger, gather: Gather = in_process
) -> Calibrated:
    """Run the phases before the first round, and write the masks into the run folder.

    Args:
        job: the run to execute.
        assembly: the parts of the run; its network is moved to its device, with the prepared head.
        module: the clients; their losses are used.
        ledger: counts bytes and client steps.
        gather: runs a task for clients.

    """
    with made_in(dtype_of(assembly.problem.precision)):
        return _prepare(job, assembly, build_preparation(assembly, module, ledger, gather), module)


def _prepare(job: Job, assembly: Assembly, preparation: Preparation, module: ClientModule) -> Calibrated:
    problem, phases, rule = assembly.problem, assembly.course.phases, assembly.method.rule
    try_out(module, *preparation.take(problem.dataset.train, np.arange(min(2, len(problem.dataset.train.y)))))
    method, shared = assembly.method, beside_others()
    if phases.has("head"):
        steps = phases.prepares("head")
        with waiting("head", shared, steps if method.head.init == "probe" else 1):
            start_head(assembly, preparation, steps)
    with waiting("calibration", shared, method.calibration.rounds) if phases.has("calibrate") else nullcontext():
        found = _ranked(choose_mask(assembly, preparation), assembly)
    if assembly.pictures:
        _draw_partition(job, problem)
    if phases.explore is not None:
        return found
    if isinstance(rule, FromFile):
        _check_given(job, rule, found.mask, assembly.config["sparsity"].get("ratio"))
    mask = record(job, found.mask, found.bitmaps, found.overlap)
    if assembly.pictures:
        draw(job.folder, mask)
    return replace(found, mask=mask)


def _ranked(found: Calibrated, assembly: Assembly) -> Calibrated:
    """Give each client the part of the mask that its rank trains; all of it, if all have one rank."""
    problem, ranks = assembly.problem, assembly.method.ranks
    if not ranks:
        return found
    row, masks = found.mask.row(problem.space), rank_masks(problem.adapters, problem.space, ranks)
    return replace(found, bitmaps=torch.stack([pack(row & mask) for mask in masks]))


def picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Draw and write a figure as PNG; an error is logged in one line, and does not end the run."""

    def content() -> bytes:
        found = io.BytesIO()
        draw().savefig(found, format="png", dpi=120)
        return found.getvalue()

    illustration(path, content)


def illustration(path: Path, content: Callable[[], bytes]) -> None:
    """Make and write the content of a picture; an error is logged in one line, and does not end the run."""
    try:
        files.write(path, content())
    except Exception as error:
        log.warning("%s is left out (%s: %s)", path.name, type(error).__name__, " ".join(str(error).split()))


def record(job: Job, chosen: Mask, bitmaps: Tensor | None = None, overlap: Sequence[float] = ()) -> Mask:
    """Write a mask into the run folder; returns it with the metadata of the file.

    Raises:
        ValueError: no coordinate trains.

    """
    rule = job.choices.get("mask_rule", chosen.metadata["rule"])
    mask = Mask(chosen.tensors, chosen.metadata | {"rule": rule, OVERLAP: json.dumps(overlap)})
    if mask.density == 0:
        raise ValueError(NOTHING)
    mask.save(job.folder / MASK)
    if bitmaps is not None and len(bitmaps):
        files.write(job.folder / CLIENT_MASKS, save({"bitmaps": bitmaps}, dict(mask.metadata)))
    for layer, density in mask.by_layer().items():
        log.info("density %-30s %.4f", layer, density)
    return mask


def _draw_partition(job: Job, problem: Problem) -> None:
    from fedsparse.analysis.partition_plot import partition_figure  # here: a run without pictures draws none

    labels, title = problem.dataset.train.labels, job.choices.get("partition", "")
    classes = 1 if problem.dataset.sequences else problem.dataset.classes  # without classes: sizes alone
    with waiting("picture of the partition", beside_others()):
        picture(job.folder / PARTITION, lambda: partition_figure(labels, problem.parts, classes, title))


def draw(folder: Path, mask: Mask) -> None:
    """Draw a mask's figure into the run folder."""
    from fedsparse.analysis.mask_plot import mask_figure  # here, as above

    title = f"mask rule {mask.metadata['rule']}, {mask.density:.1%} of the weights train"
    picture(folder / MASK_PICTURE, lambda: mask_figure(mask, title=title))


def _counted(gather: Gather) -> Gather:
    """Show how many clients have answered."""

    def run(preparation: Preparation, task: ClientTask, clients: Sequence[int]) -> Iterator[Answer | None]:
        for place, answer in enumerate(gather(preparation, task, clients)):
            advance(place + 1, len(clients))
            yield answer

    return run


def build_preparation(
    assembly: Assembly, module: ClientModule, ledger: Ledger, gather: Gather = in_process
) -> Preparation:
    """Build the preparation of head and mask, and move the network to its device."""
    problem, device = assembly.problem, device_of(assembly.session.accelerator)
    return Preparation(
        net=problem.net.to(device),
        space=problem.space,
        dataset=problem.dataset,
        parts=problem.parts,
        sample=assembly.course.sample,
        losses=module.losses,
        batch_size=problem.batch_size,
        seed=problem.seed,
        ledger=ledger,
        model_length=problem.model_length,
        inputs=problem.inputs,
        device=device,
        gather=_counted(gather),
    )


def start_head(assembly: Assembly, preparation: Preparation, steps: int) -> None:
    """Prepare the head in ``steps`` steps; it is the same for all mask rules of a seed."""
    head, patterns, lr = assembly.method.head, assembly.problem.head, assembly.method.calibration.head_lr
    if head.init == "random":
        return
    config = assembly.config
    options = {**config["head"], "steps": steps, "lr": lr, "sampled": _sampled(preparation, Purpose.HEAD, steps)}
    Cache(assembly.method.calibration.cache).head(
        preparation,
        options | {"client": config["client"]},
        patterns,
        lambda: prepare_head(preparation, head, patterns, steps, lr),
    )


def choose_mask(assembly: Assembly, preparation: Preparation) -> Calibrated:
    """Choose the mask of the first round: calibrate, or read the masks of an equal calibration from the cache.

    Before an exploration all coordinates train.
    """
    method, rule = assembly.method, assembly.method.rule
    calibration = method.calibration
    job = CalibrationJob(rule, method.sparsity, calibration, assembly.problem.head)
    if assembly.course.phases.explore is not None:
        everything = Mask.of(preparation.space, torch.ones(preparation.space.size, dtype=torch.bool), rule="Dense")
        return Calibrated(everything, observed=observe(preparation, job))
    choose = calibrate_clients if method.own_masks else calibrate
    if method.changes or not rule.calibration:  # a later choice needs the observed values
        return choose(preparation, job)
    cache_key = {key: assembly.config[key] for key in ("mask_rule", "sparsity", "mask", "client")}
    options = {key: value for key, value in assembly.config["calibration"].items() if key != "cache"}
    cache_key["calibration"] = options | {"rounds": calibration.rounds}
    cache_key["sampled"] = _sampled(preparation, Purpose.CALIBRATION, calibration.rounds)
    cache_key["rule"] = source_of(rule)
    return Cache(calibration.cache).calibrated(preparation, cache_key, lambda: choose(preparation, job))


def _sampled(preparation: Preparation, purpose: Purpose, rounds: int) -> list[list[int]]:
    """Draw the clients of each round of a preparation."""
    return [list(preparation.sample(round, purpose)) for round in range(rounds)]


def save_deviation(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Write the deviation observed in an exploration, by tensor, beside the masks (``explore.save=true``)."""
    files.write(folder / DEVIATION, save({name: part.contiguous() for name, part in found.items()}))


def _check_given(job: Job, rule: FromFile, mask: Mask, asked: Any) -> None:
    """Refuse a sparsity other than that of a mask file.

    Raises:
        ValueError: one line with the file's ratio and the overrides.

    """
    typed_overrides = [o for o in trust.overrides(job.folder) if o.startswith("sparsity")]
    ratio = mask.metadata.get("ratio")
    if typed_overrides and ratio is not None and float(ratio) != asked:
        raise ValueError(
            f"mask_rule=from_file sets the sparsity: {rule.path} has sparsity.ratio={ratio}; "
            f"leave out {' '.join(typed_overrides)}"
        )
