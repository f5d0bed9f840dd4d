"""Fedland's models: sizes by hand, the path norm against plain sums, and a round of a federation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from fedsparse.landscape import path_norm
from fedsparse.models.convnets import fednet_mlp, resnet_small


def test_fednet_mlp_is_the_published_size():
    net = fednet_mlp(10, 784)
    # 784 x 64 + 64, 64 x 32 + 32, 32 x 10 + 10
    assert sum(p.numel() for p in net.parameters()) == 50_240 + 2_080 + 330 == 52_650
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Flatten", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert net.dropout.p == 0.5
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert not hasattr(fednet_mlp(10, 784, dropout=0), "dropout")


def test_the_path_norm_of_fednet_mlp_is_that_of_numpy():
    net = fednet_mlp(10, 784, seed=3)
    squares = [p.detach().double().numpy() ** 2 for p in net.parameters()]
    out = np.ones(784)
    for weight, bias in zip(squares[::2], squares[1::2], strict=True):
        out = weight @ out + bias  # squares are not negative, so that ReLU changes nothing
    assert len(squares) == 6
    assert path_norm(net.train(), (1, 28, 28)) == pytest.approx(math.sqrt(out.sum()), rel=1e-12)


def test_resnet_small_is_torchvisions_resnet_of_four_blocks():
    net = resnet_small(10, 3)
    theirs = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(net.state_dict())  # the very same names
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), theirs(x))
    stem, blocks, head = 27 * 64 + 128, 2 * 9 * 64 * 64 + 256, 512 * 10 + 10
    for held, made in ((64, 128), (128, 256), (256, 512)):
        blocks += 9 * made * (held + made) + held * made + 6 * made  # two convolutions, that of the shortcut, norms
    assert sum(p.numel() for p in net.parameters()) == stem + blocks + head == 4_903_242
    assert resnet_small(10, 1)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def stirred(net):
    """The network with statistics and biases of BatchNorm that are not those of the start."""
    g = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -1), (module.running_var, 0.5), (module.bias.data, -0.5)):
                tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=g))
    return net


def squared(x, conv, norm):
    """A convolution with the squares of its folded weights and biases."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight**2, shift**2, conv.stride, conv.padding)


@torch.no_grad()
def test_the_path_norm_of_resnet_small_is_of_its_folded_form():
    net = stirred(resnet_small(10, 1)).double()
    x = squared(torch.ones(1, 1, 8, 8, dtype=torch.float64), net.conv1, net.bn1)
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        block = layer[0]
        short = x if block.downsample is None else squared(x, *block.downsample)
        x = squared(squared(x, block.conv1, block.bn1), block.conv2, block.bn2) + short
    out = x.mean((2, 3)) @ net.fc.weight.T**2 + net.fc.bias**2
    assert path_norm(net, (1, 8, 8)) == pytest.approx(math.sqrt(float(out.sum())), rel=1e-9)


ROUND = ["mask_rule=dense", "pictures=false", "federation.num_clients=3", "federation.rounds=1", "head.init=random"]


@pytest.mark.parametrize("model", ["fednet_mlp", "resnet_small"])
def test_a_round_trains_it(run_in, model):
    options = [*ROUND, "federation.clients_per_round=2", "federation.local_steps=1"]
    summary, folder = run_in(model, f"model={model}", *options)
    weights = load_file(folder / "model.safetensors")
    size = {"fednet_mlp": 64 * 64 + 64 + 2_080 + 330, "resnet_small": 4_903_242 - 2 * 9 * 64}[model]  # 8 x 8, grey
    assert summary["num_parameters"] == size
    assert summary["dropped_updates"] == 0
    start = {"fednet_mlp": lambda: fednet_mlp(10, 64), "resnet_small": lambda: resnet_small(10, 1)}[model]()
    for name, parameter in start.named_parameters():
        assert not torch.equal(weights[name], parameter), name


def test_fednet_mlp_stacks_over_clients(run_in):
    """Dropout draws other units where clients are stacked, so that it is off here."""
    options = ["model=fednet_mlp", "model.dropout=0", *ROUND, "federation.clients_per_round=3"]
    found = []
    for cohort in (1, 3):
        summary, folder = run_in(f"of{cohort}", *options, f"federation.cohort={cohort}")
        assert summary["cohort"] == cohort
        found.append(load_file(folder / "model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
