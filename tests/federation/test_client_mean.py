"""Weighted means over the clients of a round, summed up by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedsparse.federation.masking import ClientMean

CPU = torch.device("cpu")


def test_means_by_weight_by_hand():
    running = ClientMean(3, CPU)
    running.add(torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3]), [1.0, 0.0], [4.0, math.nan])
    running.add(torch.tensor([[5.0, 6.0, 11.0]]), [3.0], [8.0])
    mean, loss = running.finish()
    assert (mean.tolist(), mean.dtype, loss) == ([4.0, 5.0, 9.0], torch.float64, 7.0)


def test_without_any_weight_there_is_no_mean():
    running = ClientMean(2, CPU)
    running.add(torch.ones(1, 2), [0.0], [1.0])
    assert running.finish() is None


def test_two_processes_of_the_same_rows_have_the_mean_of_one(monkeypatch):
    """A stand-in for torch's reduction: the sums of a second process of three times the weight."""
    running = ClientMean(2, CPU)
    running.add(torch.tensor([[2.0, 4.0]]), [0.5], [3.0])
    monkeypatch.setattr("fedsparse.core.parallel.joined", lambda: True)
    other = 3 * torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda vector: vector.add_(other))
    mean, loss = running.finish()
    assert (mean.tolist(), loss) == ([2.0, 4.0], 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_too_large_for_the_dtype_counts_as_its_largest_number(dtype):
    most, running = torch.finfo(dtype).max, ClientMean(3, CPU)
    running.add(torch.tensor([[-3.0, 0.0, most]], dtype=dtype).square(), [0.5], [1.0])
    found = running.finish()
    assert found is not None
    assert found[0].tolist() == [9.0, 0.0, most]
