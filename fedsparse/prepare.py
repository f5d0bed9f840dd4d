"""The part of a run before its first round, and what it leaves in the run folder: partition, head, masks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from fedsparse import build, results
from fedsparse.analysis.mask_plot import mask_figure
from fedsparse.federation.calibration import Calibrated
from fedsparse.federation.client import ClientModule
from fedsparse.federation.ledger import Ledger
from fedsparse.masks import Mask, overlaps
from fedsparse.masks.bitmaps import masks_of
from fedsparse.resume import Job
from fedsparse.space import ParamSpace

log = logging.getLogger("fedsparse")
MASK, CLIENT_MASKS = "mask.safetensors", "client_masks.safetensors"


def prepare(job: Job, federation: build.Federation, module: ClientModule, ledger: Ledger) -> Calibrated:
    """Prepare head and masks, and write partition, masks and their picture into the run folder."""
    if job.cfg.pictures:
        results.save_partition(federation, job.choices.get("partition", ""), job.folder / "partition.png")
    setting = build.build_setting(job.cfg, federation, ledger, module)
    build.start_head(job.cfg, setting)
    found = build.choose_mask(job.cfg, setting)
    rule = job.choices.get("mask_rule", found.mask.metadata["rule"])
    mask = Mask(found.mask.tensors, found.mask.metadata | {"rule": rule})
    if rule == "from_file":
        _check_given(job, mask)
    write(job.folder, mask, found.bitmaps)
    if job.cfg.pictures:
        title = f"mask rule {rule}, {mask.density:.1%} of the weights train"
        mask_figure(mask, title=title).savefig(job.folder / "mask.png", dpi=120)
    return replace(found, mask=mask)


def write(folder: Path, mask: Mask, bitmaps: torch.Tensor) -> None:
    """Write the masks, and the density of each layer into the log."""
    mask.save(folder / MASK)
    if len(bitmaps):
        save_file({"bitmaps": bitmaps}, folder / CLIENT_MASKS, dict(mask.metadata))
    for layer, density in mask.by_layer().items():
        log.info("density %-30s %.4f", layer, density)


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


def _check_given(job: Job, mask: Mask) -> None:
    """Refuse another sparsity beside that of a mask file: only one of them could be meant.

    Raises:
        ValueError: names the file's ratio and the one that was typed.

    """
    typed = [o for o in _overrides(job.folder) if o.startswith("sparsity")]
    ratio = mask.metadata.get("ratio")
    if typed and ratio is not None and float(ratio) != job.cfg.sparsity.get("ratio"):
        raise ValueError(
            f"mask_rule=from_file sets the sparsity: {job.cfg.mask_rule.path} has sparsity.ratio={ratio}; "
            f"leave out {' '.join(typed)}"
        )


def _overrides(folder: Path) -> list[str]:
    """Read what was typed, as Hydra stored it."""
    path = folder / ".hydra" / "overrides.yaml"
    return [str(o) for o in yaml.safe_load(path.read_text(encoding="utf-8")) or []] if path.is_file() else []
