"""What clients tell a mask rule, summed up by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedsparse.federation.masking import Guide

CPU = torch.device("cpu")


def test_means_by_weight_by_hand():
    guide = Guide(3, CPU)
    guide.add(torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3]), [1.0, 0.0], [4.0, math.nan])
    guide.add(torch.tensor([[5.0, 6.0, 11.0]]), [3.0], [8.0])
    mean, loss = guide.finish()
    assert (mean.tolist(), mean.dtype, loss) == ([4.0, 5.0, 9.0], torch.float64, 7.0)


def test_nobody_told_anything():
    guide = Guide(2, CPU)
    guide.add(torch.ones(1, 2), [0.0], [1.0])
    assert guide.finish() is None


def test_two_processes_that_were_told_the_same_have_the_mean_of_one(monkeypatch):
    """A stand-in for torch's reduction: the sums of a second process that heard three times as much."""
    guide = Guide(2, CPU)
    guide.add(torch.tensor([[2.0, 4.0]]), [0.5], [3.0])
    monkeypatch.setattr("fedsparse.core.parallel.joined", lambda: True)
    other = 3 * torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda vector: vector.add_(other))
    mean, loss = guide.finish()
    assert (mean.tolist(), loss) == ([2.0, 4.0], 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_too_large_for_the_dtype_counts_as_its_largest_number(dtype):
    most, guide = torch.finfo(dtype).max, Guide(3, CPU)
    guide.add(torch.tensor([[-3.0, 0.0, most]], dtype=dtype).square(), [0.5], [1.0])
    found = guide.finish()
    assert found is not None
    assert found[0].tolist() == [9.0, 0.0, most]
