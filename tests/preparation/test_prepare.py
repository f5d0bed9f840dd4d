"""What a run leaves before its first round, where no other test looks."""

from __future__ import annotations

import pytest
import torch

from fedsparse.core.space import ParamSpace
from fedsparse.job.summary import mean_client_overlap, sparsity_of
from fedsparse.masks import Mask
from fedsparse.masks.bitmaps import pack
from fedsparse.preparation.calibration import Calibrated

SPACE = ParamSpace(["body.weight", "head.weight"], [torch.Size([8]), torch.Size([2])])


def row(*trained):
    mask = torch.zeros(10, dtype=torch.bool)
    mask[list(trained)] = True
    return mask


def test_the_sparsity_of_a_mask_is_its_makers_or_else_counted_without_the_head():
    always = SPACE.where("head.*")
    foreign = Mask.of(SPACE, row(0, 1, 8, 9))
    assert sparsity_of(foreign, always, SPACE) == 1 - 2 / 8
    assert sparsity_of(Mask.of(SPACE, row(0, 1, 8, 9), ratio="0.7"), always, SPACE) == 0.7


def test_the_overlap_of_clients_is_the_mean_over_pairs_and_leaves_out_who_has_no_mask():
    rows = [row(0, 1, 8), row(1, 2, 8), row(), row(4, 5, 9)]
    found = Calibrated(Mask.of(SPACE, row(*range(10))), torch.stack([pack(r) for r in rows]))
    assert mean_client_overlap(found, SPACE) == pytest.approx((2 / 4 + 0 + 0) / 3)
    assert mean_client_overlap(Calibrated(found.mask), SPACE) is None
