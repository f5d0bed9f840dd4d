"""Builders of image models: the small pre-trained vision transformer of the default run, and two reference nets.

A builder's weights depend on its arguments alone: the global random state is neither read nor moved.

Shapes: ``N`` images, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from fedsparse.core.absent import absent
from fedsparse.core.checks import check_whole
from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.models.loading import load_backbone

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

HEAD = "head."

Net = TypeVar("Net", bound=nn.Module)


def vit_digits(
    num_classes: int = 10,
    in_chans: int = 1,
    pretrained: bool = True,
    checkpoint: str | None = None,
    head_std: float = 0.02,
    seed: int = 0,
) -> VisionTransformer:
    """Build timm's ``VisionTransformer`` for 8 x 8 images: patch 2, width 64, depth 4, 4 heads, about 202k parameters.

    The packaged backbone was trained on letters rendered from fonts (``python -m fedsparse.studies.pretrain``), never
    on digits. It expects pixels standardised as by ``fedsparse.data.datasets.digits``. Attention is timm's plain one:
    the fused kernel has no batching rule under ``vmap`` on a CPU and gains nothing on 17 tokens.

    Args:
        num_classes: outputs of the head.
        in_chans: C, channels of an image; the packaged backbone has one.
        pretrained: start the backbone from the packaged weights; else at random, from ``seed``.
        checkpoint: a file of weights under timm's names, used in place of the packaged one. Its ``head.*`` tensors,
            if any, are left out: the head always starts anew.
        head_std: standard deviation of the head's normal before it is cut at two of them; the bias is zero.
        seed: decides the head, and the backbone if that is random.

    Returns:
        A module (N, C, 8, 8) -> (N, num_classes).

    Raises:
        ValueError: there is no class, or the checkpoint is missing, damaged, or of another model.

    """
    check_whole("model.num_classes", num_classes, 1)
    net = seeded(lambda: _vit(num_classes, in_chans), seed)
    for block in net.blocks:
        vars(block.attn)["fused_attn"] = False  # timm's own switch for one layer, declared Final for its scripts
    if checkpoint is not None:
        load_backbone(net, Path(checkpoint))
    elif pretrained:
        with as_file(files("fedsparse.models") / "weights" / "vit_digits.safetensors") as path:
            load_backbone(net, path)
    start_head(net.get_submodule("head"), head_std, seed)
    return net


def mlp(in_features: int, hidden: int, num_classes: int, seed: int = 0) -> nn.Module:
    """Build a reference net with one hidden layer: (N, C, H, W) of ``in_features`` values -> (N, num_classes)."""

    def build() -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
        return nn.Sequential(OrderedDict(zip(("flatten", "hidden", "relu", "head"), layers, strict=True)))

    return seeded(build, seed)


def conv(num_classes: int, in_chans: int, seed: int = 0) -> nn.Module:
    """Build a reference net of two convolutions and a global mean: (N, C, H, W) of any size -> (N, num_classes).

    It has no normalisation, so that any number of clients can be stacked.
    """

    def build() -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(in_chans, 16, 3, padding=1)
        layers["relu1"] = nn.ReLU()
        layers["conv2"] = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        layers["relu2"] = nn.ReLU()
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(32, num_classes)
        return nn.Sequential(layers)

    return seeded(build, seed)


def seeded(build: Callable[[], Net], seed: int) -> Net:
    """Call ``build`` under its own seed, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would also seed the accelerators, which fork_rng is told to leave alone
        torch.default_generator.manual_seed(seed)
        return build()


@torch.no_grad()
def start_head(head: nn.Module, std: float, seed: int) -> None:
    """Start a head from a normal of mean 0 cut at two standard deviations, from a stream of its own; the bias is zero.

    A head of zeros would make the Fisher information of the whole backbone zero.
    """
    generator = torch_generator(seed, Purpose.HEAD)
    weight, bias = head.get_parameter("weight"), head.get_parameter("bias")
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    nn.init.zeros_(bias)


def _vit(num_classes: int, in_chans: int) -> VisionTransformer:
    with absent("wandb"):  # which timm imports for the logs of its own training
        from timm.models.vision_transformer import VisionTransformer  # here: timm takes a second to import

    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=in_chans, num_classes=num_classes, embed_dim=64, depth=4, num_heads=4
    )
