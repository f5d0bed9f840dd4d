"""A pruned network made smaller computes the same; what cannot leave exactly stays, and is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Sparsity
from fedsparse.masks.select import select
from fedsparse.models.attention import attentions
from fedsparse.models.convnets import fednet, resnet18_gn, two_cnn
from fedsparse.models.pretrained import timm_model
from fedsparse.models.shrink import Trial, shrink
from fedsparse.models.structure import rebuild, structure
from fedsparse.models.vision import conv, mlp, vit_digits

pytest.importorskip("torch_pruning")


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def zero(layer, *units):
    """Prune output units: rows and biases."""
    for unit in units:
        layer.weight[unit] = 0
        if layer.bias is not None:
            layer.bias[unit] = 0


@torch.no_grad()
def filled(net, seed=0):
    """No zeros but those that a test puts in: biases and norms start at zero and one."""
    g = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.dim() == 1:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=g))
    return net.eval()


def cut_of(cuts, layer):
    return next(((c.before, c.after, c.dead) for c in cuts if c.layer == layer), None)


def why(cuts, layer):
    return next(c.why for c in cuts if c.layer == layer)


@torch.no_grad()
def assert_same(net, small, x):
    fresh = images(*x.shape, seed=99)  # other inputs than those that the removal was tried on
    for some in (x, fresh, 5 * fresh, fresh[:1]):
        torch.testing.assert_close(small(some), net(some), rtol=1e-5, atol=1e-5)


def test_hidden_units_of_an_mlp_leave():
    net, x = filled(mlp(6, 5, 3)), images(4, 1, 2, 3)
    zero(net.hidden, 1, 4)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    small, cuts = shrink(net, x)
    kept = [0, 2, 3]
    assert torch.equal(small.hidden.weight, net.hidden.weight[kept])
    assert torch.equal(small.head.weight, net.head.weight[:, kept])
    assert (small.hidden.out_features, small.head.in_features) == (3, 3)
    assert cut_of(cuts, "hidden") == (5, 3, 0)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())  # the given one is as it was
    assert_same(net, small, x)


def test_units_that_the_next_layer_multiplies_by_zero_leave():
    net, x = filled(mlp(6, 5, 3)), images(4, 1, 2, 3)
    with torch.no_grad():
        net.head.weight[:, 2] = 0
    small, cuts = shrink(net, x)
    assert cut_of(cuts, "hidden") == (5, 4, 0)
    assert_same(net, small, x)


def test_a_bias_keeps_its_unit():
    net, x = filled(mlp(6, 5, 3)), images(4, 1, 2, 3)
    zero(net.hidden, 1)
    with torch.no_grad():
        net.hidden.bias[1] = 0.3
        net.hidden.weight[3] = 0
        net.hidden.bias[3] = -0.3  # ReLU makes it zero: this one can go
    small, _ = shrink(net, x)
    assert torch.equal(small.hidden.weight, net.hidden.weight[[0, 1, 2, 4]])
    assert_same(net, small, x)


def test_one_unit_stays_of_a_dead_layer_and_outputs_always():
    net, x = filled(mlp(6, 5, 3)), images(4, 1, 2, 3)
    zero(net.hidden, *range(5))
    zero(net.head, 0)
    small, cuts = shrink(net, x)
    assert (cut_of(cuts, "hidden"), why(cuts, "hidden")) == ((5, 1, 1), "one unit has to stay")
    assert (cut_of(cuts, "head"), why(cuts, "head")) == ((3, 3, 1), "they are the network's outputs")
    assert_same(net, small, x)


def test_what_a_later_layer_no_longer_takes_frees_units_before():
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)]
    net, x = filled(nn.Sequential(*layers)), images(3, 4)
    with torch.no_grad():
        net[2].weight[1:, 0] = 0  # unit 0 of the first layer feeds unit 0 of the second alone
    zero(net[2], 0)
    small, cuts = shrink(net, x)
    assert (cut_of(cuts, "0"), cut_of(cuts, "2")) == ((5, 4, 0), (6, 5, 0))
    assert_same(net, small, x)


def test_channels_leave_with_their_blocks_behind_a_flatten():
    net, x = filled(two_cnn(10, 1, hidden=4)), images(3, 1, 14, 14)
    zero(net.conv1, 0)
    zero(net.conv2, 2, 7)
    zero(net.hidden, *range(500))
    small, cuts = shrink(net, x)
    columns = [49 * c + i for c in (0, 1, 3, 4, 5, 6) for i in range(49)]
    assert torch.equal(small.hidden.weight, net.hidden.weight[500:][:, columns])
    assert torch.equal(small.conv2.weight, net.conv2.weight[[0, 1, 3, 4, 5, 6]][:, 1:])
    assert [cut_of(cuts, layer) for layer in ("conv1", "conv2", "hidden")] == [(4, 3, 0), (8, 6, 0), (512, 12, 0)]
    assert_same(net, small, x)


def test_channels_leave_before_a_global_mean():
    net, x = filled(conv(4, 2)), images(3, 2, 8, 8)
    zero(net.conv1, *range(8))
    zero(net.conv2, 5)
    small, cuts = shrink(net, x)
    assert (cut_of(cuts, "conv1"), cut_of(cuts, "conv2")) == ((16, 8, 0), (32, 31, 0))
    assert_same(net, small, x)


def test_batch_norm_lets_go_what_it_leaves_zero():
    net, x = filled(fednet(4, 1, 8)), images(3, 1, 8, 8)
    zero(net.conv1, 0, 1, 2, 3)  # 0: shifted up; 1: not shifted; 2: shifted below zero, which ReLU takes away
    zero(net.norm2, 5)  # scale and shift 0: whatever the convolution says
    with torch.no_grad():
        net.norm1.running_mean.zero_()
        net.norm1.bias[1], net.norm1.bias[2], net.norm1.running_mean[3] = 0, -0.2, -0.4
        net.norm1.bias[3] = 0  # the mean shifts it all the same
    small, cuts = shrink(net, x)
    kept = [0, *range(3, 32)]
    assert torch.equal(small.norm1.running_var, net.norm1.running_var[kept])
    assert torch.equal(small.conv1.weight, net.conv1.weight[kept])
    assert (cut_of(cuts, "conv1"), cut_of(cuts, "conv2")) == ((32, 30, 2), (64, 63, 0))
    assert "shift of a norm" in why(cuts, "conv1")
    assert_same(net, small, x)


@pytest.mark.parametrize("fused", [False, True])
def test_heads_and_hidden_units_of_a_transformer_leave(fused):
    net, x = filled(vit_digits()), images(3, 1, 8, 8)
    for block in net.blocks:
        vars(block.attn)["fused_attn"] = fused
    zero(net.blocks[0].attn.qkv, *range(128 + 16, 128 + 32))  # values of head 1
    zero(net.blocks[1].attn.qkv, *range(16), *range(64, 80))  # queries and keys of head 0: an even attention
    zero(net.blocks[2].mlp.fc1, *range(3, 9))
    with torch.no_grad():
        net.blocks[3].attn.proj.weight[:, 32:] = 0  # heads 2 and 3
    small, cuts = shrink(net, x)
    assert [block.attn.num_heads for block in small.blocks] == [3, 4, 4, 2]
    rows = [r for r in range(192) if r % 64 not in range(16, 32)]
    assert torch.equal(small.blocks[0].attn.qkv.weight, net.blocks[0].attn.qkv.weight[rows])
    assert small.blocks[2].mlp.fc2.weight.shape == (64, 250)
    assert (cut_of(cuts, "blocks.0.attn"), cut_of(cuts, "blocks.3.attn")) == ((4, 3, 0), (4, 2, 0))
    assert why(cuts, "blocks.1.attn.qkv") == "of heads, only whole ones can leave"
    assert_same(net, small, x)


def test_one_head_stays():
    net, x = filled(vit_digits()), images(2, 1, 8, 8)
    zero(net.blocks[0].attn.qkv, *range(192))
    small, cuts = shrink(net, x)
    assert (cut_of(cuts, "blocks.0.attn"), why(cuts, "blocks.0.attn")) == ((4, 1, 1), "one head has to stay")
    assert_same(net, small, x)


def pruned_by_units(net, head, ratio=0.5):
    space, g = ParamSpace.of(filled(net)), torch.Generator().manual_seed(0)
    scores = torch.rand(space.size, generator=g)
    mask = select(scores, space, Sparsity(ratio, unit="output", always_train=head), largest=True)
    space.write(net, space.read(net) * mask)
    return net


def test_nothing_leaves_a_resnet_with_group_norm():
    net, x = pruned_by_units(resnet18_gn(5), "fc.*"), images(2, 3, 16, 16)
    small, cuts = shrink(net, x)
    assert all(c.before == c.after and c.why == "their outputs go through GroupNorm" for c in cuts)
    assert_same(net, small, x)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet10t", 32),
        ("mobilenetv3_small_050", 32),  # depthwise convolutions and gates over channels
        ("convnext_atto", 32),
        ("test_vit", 160),
        pytest.param("swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),  # attention of its own kind
        pytest.param("densenet121", 32, marks=pytest.mark.slow),  # concatenations
    ],
)
def test_nets_of_timm_compute_the_same(name, size):
    net = timm_model(name, 5, pretrained=False)
    head = "head.*" if hasattr(net, "head") else ["fc.*", "classifier.*"]
    pruned_by_units(net, head)
    x = images(2, 3, size, size)
    small, _ = shrink(net, x)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())
    assert_same(net, small, x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 16, 2, batch_first=True)
        self.middle, self.fc = nn.Linear(16, 12), nn.Linear(12, 20)

    def forward(self, x):
        return self.fc(self.middle(self.lstm(self.embedding(x))[0][:, -1]).relu())


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        return self.second(self.attention(h, h, h, need_weights=False)[0].mean(1))


class Gated(nn.Module):
    """Zero rows whose units are not zero: the input is added, a sigmoid is a half, a softmax counts its inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.share, self.last = (nn.Linear(8, n) for n in (8, 8, 8, 3))

    def forward(self, x):
        h = self.first(x) + x
        return self.last(self.gate(h).sigmoid() * self.share(h).softmax(-1))


@pytest.mark.parametrize("net", [Recurrent, TorchAttention, Gated])
def test_unusual_nets_compute_the_same(net):
    net = filled(net())
    for module in net.modules():
        if isinstance(module, nn.Linear):
            zero(module, 0, 1)
    tokens = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
    x = tokens if isinstance(net, Recurrent) else images(4, 5, 8) if isinstance(net, TorchAttention) else images(4, 8)
    small, cuts = shrink(net, x)
    assert {c.layer: c.after for c in cuts if c.before > c.after} == (
        {"middle": 10} if isinstance(net, Recurrent) else {}
    )
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


class Own(nn.Module):
    """Uses the outputs of a layer in a way that no rule knows: the number of units matters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x).relu()
        return self.second(h / h.shape[1])


def test_a_removal_that_moves_the_outputs_is_taken_back():
    net, x = filled(Own()), images(3, 4)
    zero(net.first, 2)
    small, cuts = shrink(net, x)
    assert (cut_of(cuts, "first"), why(cuts, "first")) == ((6, 6, 1), "removing them changes the outputs")
    assert small.first.out_features == small.second.in_features == 6
    assert_same(net, small, x)


def test_a_trial_puts_tensors_and_sizes_back():
    net = nn.Sequential(nn.Linear(2, 2))
    trial, weight = Trial(net, images(1, 2)), net[0].weight

    def change():
        net[0].weight, net[0].out_features = nn.Parameter(torch.zeros(1, 2)), 1

    assert not trial.keeps(change, [net[0]])
    assert net[0].weight is weight
    assert net[0].out_features == 2


def test_a_smaller_network_is_built_again():
    net, x = filled(vit_digits()), images(2, 1, 8, 8)
    zero(net.blocks[0].attn.qkv, *range(128, 144))
    zero(net.blocks[0].mlp.fc1, 0)
    small, _ = shrink(net, x)
    sizes = structure(net, small)
    assert sizes["blocks.0.attn"] == {"num_heads": 3, "attn_dim": 48}
    again = rebuild(vit_digits(seed=5), sizes, small.state_dict()).eval()
    assert torch.equal(again(x), small(x))
    assert attentions(again)[0].heads == 3


def test_what_does_not_fit_is_refused():
    small = mlp(6, 3, 2)
    with pytest.raises(ValueError, match="does not fit the network: elsewhere"):
        rebuild(mlp(6, 5, 2), {"elsewhere": {"out_features": 3}}, small.state_dict())
    with pytest.raises(ValueError, match="does not fit the network: hidden"):
        rebuild(mlp(6, 5, 2), {"hidden": {"forward": 3}}, small.state_dict())
    with pytest.raises(ValueError, match="do not fit the network: .*head.bias"):
        rebuild(mlp(6, 5, 2), {}, {k: t for k, t in small.state_dict().items() if k != "head.bias"})
