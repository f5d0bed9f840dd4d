"""Builders of the nets of other federated experiments; each starts at random, from its seed.

None carries ``pretrained_cfg``: images come at the data's own size, normalised by the data's own constants.

Shapes: ``N`` images, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from timm.layers.norm import GroupNorm
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from fedsparse.core.checks import check_choice, check_whole
from fedsparse.models.vision import Net, seeded, start_head

STEMS = ("cifar", "imagenet")


def resnet18_gn(
    num_classes: int, in_chans: int = 3, stem: str = "cifar", head_std: float = 0.02, seed: int = 0
) -> nn.Module:
    """Build ResNet-18 with GroupNorm: (N, C, H, W) of any size -> (N, num_classes); the head is ``fc``.

    Clients with few classes break BatchNorm, and GroupNorm is the common cure (Hsieh et al. 2020, "The Non-IID Data
    Quagmire of Decentralized Machine Learning"; Reddi et al. 2021, "Adaptive Federated Optimization"). 32 groups, as Wu
    and He 2018 propose. Blocks do not start as identities: the scores of a mask would vanish inside them.

    Args:
        num_classes: outputs of the head.
        in_chans: C, channels of an image.
        stem: ``cifar``, a 3 x 3 convolution without pooling, for small images; ``imagenet``, 7 x 7 and pooling.
        head_std: standard deviation of the head's normal before it is cut at two of them; the bias is zero.
        seed: decides all weights.

    Raises:
        ValueError: the stem is neither, or there is no class.

    """
    check_choice("model.stem", stem, *STEMS)

    def build() -> nn.Module:
        options = {"norm_layer": GroupNorm, "zero_init_last": False}
        net: nn.Module = ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_chans, **options)  # type: ignore[arg-type]
        return _small_stem(net, in_chans) if stem == "cifar" else net

    return _started(build, "fc", num_classes, head_std, seed)


def resnet_small(num_classes: int, in_chans: int = 3, head_std: float = 0.02, seed: int = 0) -> nn.Module:
    """Build the small ResNet of Fedland: (N, C, H, W) of any size -> (N, num_classes); the head is ``fc``.

    One block of 64, 128, 256 and 512 channels each, a 3 x 3 stem without pooling, BatchNorm: 4,903,242 parameters for
    coloured images and 10 classes. BatchNorm trains one client at a time: ``federation.cohort=1``.
    """

    def build() -> nn.Module:
        net: nn.Module = ResNet(BasicBlock, (1, 1, 1, 1), num_classes, in_chans, zero_init_last=False)  # type: ignore[arg-type]
        return _small_stem(net, in_chans)

    return _started(build, "fc", num_classes, head_std, seed)


def two_cnn(num_classes: int, in_chans: int, hidden: int = 32, head_std: float = 0.02, seed: int = 0) -> nn.Sequential:
    """Build the TwoCNN of AutoFLIP: (N, C, H, W) of any size -> (N, num_classes).

    Two 5 x 5 convolutions of ``hidden`` and twice as many channels, each pooled by two, a mean to 7 x 7 and a layer of
    512: 1,663,370 parameters for grey images, 10 classes and 32 channels, as the CNN of McMahan et al. 2017, table 2.
    """

    def build() -> nn.Sequential:
        return nn.Sequential(_two_convolutions(in_chans, hidden) | _classifier(2 * hidden * 7 * 7, num_classes, 0.0))

    return _started(build, "head", num_classes, head_std, seed)


def femnist_cnn(
    num_classes: int, in_chans: int, hidden: int = 32, head_std: float = 0.02, seed: int = 0
) -> nn.Sequential:
    """Build the FEMNISTCNN of AutoFLIP: (N, C, H, W) of any size -> (N, num_classes).

    LEAF's CNN for FEMNIST (Caldas et al. 2018, models/femnist/cnn.py) in the form of the framework that AutoFLIP is
    built on (vaseline555/Federated-Learning-in-PyTorch, src/models/femnistcnn.py): the two convolutions and the mean
    of ``two_cnn``, and a layer of 2,048: 13,180,734 parameters for grey images, 62 classes and 64 channels.
    """

    def build() -> nn.Sequential:
        dense = _classifier(2 * hidden * 7 * 7, num_classes, 0.0, 2048)
        return nn.Sequential(_two_convolutions(in_chans, hidden) | dense)

    return _started(build, "head", num_classes, head_std, seed)


def fednet(
    num_classes: int, in_chans: int, img_size: int, dropout: float = 0.5, head_std: float = 0.02, seed: int = 0
) -> nn.Sequential:
    """Build the convolutional FedNet of Fedland: (N, C, img_size, img_size) -> (N, num_classes).

    Three 3 x 3 convolutions of 32, 64 and 64 channels, each with BatchNorm and pooled by two, and a layer of 512 with
    dropout. BatchNorm trains one client at a time: ``federation.cohort=1``.

    Raises:
        ValueError: images are too small to be halved three times, or there is no class.

    """
    if img_size < 8:
        raise ValueError(f"model.img_size is {img_size}; fednet halves images three times and needs 8 or more")

    def build() -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (held, made) in enumerate(((in_chans, 32), (32, 64), (64, 64)), 1):
            layers[f"conv{i}"] = nn.Conv2d(held, made, 3, padding=1)
            layers[f"norm{i}"] = nn.BatchNorm2d(made)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        return nn.Sequential(layers | _classifier(64 * (img_size // 8) ** 2, num_classes, dropout))

    return _started(build, "head", num_classes, head_std, seed)


def fednet_mlp(
    num_classes: int, in_features: int, dropout: float = 0.5, head_std: float = 0.02, seed: int = 0
) -> nn.Sequential:
    """Build the fully connected FedNet of Fedland: (N, C, H, W) of ``in_features`` values -> (N, num_classes).

    Layers of 64 and 32, with dropout after the first: 52,650 parameters for 784 values and 10 classes. Its ReLU on the
    logits is left out: it was there so that a path norm could not be negative, and a class whose logit is 0 for all
    samples has no gradient.
    """

    def build() -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(), hidden1=nn.Linear(in_features, 64))
        layers["relu1"] = nn.ReLU()
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        layers |= {"hidden2": nn.Linear(64, 32), "relu2": nn.ReLU(), "head": nn.Linear(32, num_classes)}
        return nn.Sequential(layers)

    return _started(build, "head", num_classes, head_std, seed)


def _small_stem(net: nn.Module, in_chans: int) -> nn.Module:
    """Replace the 7 x 7 stem: its stride and pooling would leave a 32 x 32 image 8 x 8 before the first block."""
    conv = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = conv, nn.Identity()
    return net


def _two_convolutions(in_chans: int, hidden: int) -> OrderedDict[str, nn.Module]:
    """Two 5 x 5 convolutions, each pooled by two, and a mean to 7 x 7."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (held, made) in enumerate(((in_chans, hidden), (hidden, 2 * hidden)), 1):
        layers[f"conv{i}"] = nn.Conv2d(held, made, 5, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2, padding=1)
    layers["mean"] = nn.AdaptiveAvgPool2d(7)
    return layers


def _classifier(features: int, num_classes: int, dropout: float, width: int = 512) -> OrderedDict[str, nn.Module]:
    """A hidden layer and the head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(), hidden=nn.Linear(features, width))
    layers["relu"] = nn.ReLU()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["head"] = nn.Linear(width, num_classes)
    return layers


def _started(build: Callable[[], Net], head: str, num_classes: int, std: float, seed: int) -> Net:
    """Build under a seed of its own, and start the head as every builder does."""
    check_whole("model.num_classes", num_classes, 1)
    net = seeded(build, seed)
    start_head(net.get_submodule(head), std, seed)
    return net
