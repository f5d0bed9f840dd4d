"""FLOPs against those counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsparse.models.flops import forward_flops, pruning_figures, sparse_flops
from fedsparse.models.vision import mlp, vit_digits


def test_a_linear_and_a_convolution_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    x = torch.zeros(3, 2, 4, 4)
    conv, linear = 3 * 2 * (2 * 2 * 4) * (2 * 3 * 3), 3 * 2 * 16 * 5
    assert forward_flops(net, x) == conv + linear
    with torch.no_grad():
        net[0].weight[1] = 0  # a quarter
        net[3].weight[:, :8] = 0  # a half
    assert forward_flops(net, x) == conv + linear
    assert sparse_flops(net, x) == pytest.approx(0.75 * conv + 0.5 * linear)


def test_figures_of_an_mlp_by_hand():
    net = mlp(6, 4, 3)
    with torch.no_grad():
        net.hidden.weight[:2], net.hidden.bias[:2] = 0, 0
    figures = pruning_figures(net, torch.zeros(7, 1, 2, 3))
    dense = 4 * 6 + 4 + 3 * 4 + 3
    assert figures["num_nonzero"] == dense - 14
    assert figures["compression"] == pytest.approx(dense / (dense - 14))
    assert figures["flops"] == 2 * (6 * 4 + 4 * 3)
    assert figures["flops_sparse"] == 2 * (6 * 2 + 4 * 3)


def test_attention_has_no_weight_to_be_sparse():
    net, x = vit_digits(), torch.zeros(1, 1, 8, 8)
    linear = 16 * 4 * 64 + 4 * 17 * (64 * 192 + 64 * 64 + 2 * 64 * 256) + 64 * 10
    attention = 4 * 4 * 2 * 17 * 17 * 16
    assert forward_flops(net, x) == 2 * (linear + attention)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert sparse_flops(net, x) == 2 * attention
    assert pruning_figures(net, x)["compression"] == float("inf")


def test_modes_stay_as_they_were():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    before = net[0].running_mean.clone()
    forward_flops(net, torch.ones(4, 3))
    assert net.training
    assert torch.equal(net[0].running_mean, before)
