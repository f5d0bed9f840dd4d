"""Builders of pre-trained image models: any net of timm, its weights downloaded or from a file.

A net keeps ``pretrained_cfg``, what its pre-training fed it (size, mean, standard deviation, interpolation), and the
data are prepared accordingly.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

from fedsparse.core.checks import check_whole
from fedsparse.core.waits import may_download
from fedsparse.models.loading import load_backbone
from fedsparse.models.vision import seeded, start_head

COLOURS = 3  # channels of what nearly all nets of timm were pre-trained on


def timm_model(
    name: str,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = True,
    checkpoint: str | None = None,
    drop_rate: float = 0.0,
    head_std: float = 0.02,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a net of timm with a new head and, everywhere else, its pre-trained weights.

    Args:
        name: one of ``timm.list_models()``, with or without the tag of its weights:
            ``vit_small_patch16_224.dino`` is the ViT-S/16 of DINO (Caron et al. 2021).
        num_classes: outputs of the head.
        in_chans: channels of an image.
        pretrained: start from timm's weights for this name, downloaded once; else at random, from ``seed``.
        checkpoint: a file of weights used in place of the download: safetensors, or what ``torch.save`` wrote, under
            timm's names or in the layout of DINO's two files. The head in it, if any, is left out. Weights of another
            image size, and of colours where ``in_chans`` is not 3, are fitted as timm fits those that it downloads.
        drop_rate: dropout before the head.
        head_std: standard deviation of the head's normal before it is cut at two of them; the bias is zero.
        seed: decides the head, and the rest if that is random.
        **options: whatever else this net takes, such as ``img_size`` or ``drop_path_rate``.

    Returns:
        A module (N, in_chans, H, W) -> (N, num_classes).

    Raises:
        ValueError: timm has no such net, it takes no such option, it has several heads, its weights cannot be had, or
            the checkpoint is missing, damaged, or of another net.

    """
    check_whole("model.num_classes", num_classes, 1)
    classifier = _classifier(name)
    asked = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": drop_rate or None, **options}
    net = seeded(lambda: _create(name, pretrained and checkpoint is None, asked), seed)
    if checkpoint is not None:
        load_backbone(net, Path(checkpoint), f"{classifier}.*", fitted)
    start_head(net.get_submodule(classifier), head_std, seed)
    _record_input(net, in_chans, options.get("img_size"))
    return net


def fitted(net: Any, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Fit weights to a net of another image size or other channels as timm does; what it cannot fit stays as it is."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    try:
        tensors = dict(found if convert is None else convert(dict(found), net))
    except (KeyError, ValueError, RuntimeError, AssertionError):  # of another net, which the shapes show
        return found
    first = net.pretrained_cfg.get("first_conv") or ()
    for name in (first,) if isinstance(first, str) else first:
        weight, wanted = tensors.get(f"{name}.weight"), net.get_submodule(name).weight
        if weight is not None and weight.ndim == 4 and weight.shape[1] == COLOURS != wanted.shape[1]:
            tensors[f"{name}.weight"] = adapt_input_conv(wanted.shape[1], weight)
    return tensors


def head_pattern(name: str) -> str:
    """Glob pattern of the head's parameters of a net of timm, for the key ``model.head``.

    A name that timm does not know gives ``head.*``: it is the builder that refuses it, in a line of its own.

    >>> head_pattern("resnet18.a1_in1k"), head_pattern("vit_small_patch16_224.dino")
    ('fc.*', 'head.*')
    """
    try:
        return f"{_classifier(name)}.*"
    except ValueError:
        return "head.*"


def image_size(name: str) -> int:
    """Side of the images that a net of timm takes, for the key ``model.image_side``.

    A name that timm does not know gives 224, as ``head_pattern`` gives ``head.*``.

    >>> image_size("test_vit"), image_size("vit_small_patch16_224.dino")
    (160, 224)
    """
    try:
        return max(_config(name).input_size[1:])
    except ValueError:
        return 224


def _create(name: str, download: bool, asked: dict[str, Any]) -> nn.Module:
    """Call timm, and say in one line what went wrong."""
    if download and not _places(_config(name)):
        raise ValueError(f"timm has no weights for {name}; give model.checkpoint=<file> or model.pretrained=false")
    if download:
        may_download(f"timm downloads the weights of {name}, or has them in its cache")
    try:
        net: nn.Module = timm.create_model(name, pretrained=download, **asked)
    except TypeError as error:
        raise ValueError(f"model.name={name} takes no such option ({error})") from error
    except OSError as error:
        raise ValueError(
            f"the weights of {name} could not be downloaded ({type(error).__name__}); fetch "
            f"{' or '.join(_places(_config(name)))} and give it as model.checkpoint=<file>"
        ) from error
    return net


def _record_input(net: Any, in_chans: int, side: int | None) -> None:
    """Write what was asked for into ``pretrained_cfg``, where timm leaves the sizes of the pre-training."""
    _, height, width = net.pretrained_cfg["input_size"]
    net.pretrained_cfg["input_size"] = (in_chans, side or height, side or width)


def _config(name: str) -> PretrainedCfg:
    """Look up what timm knows of a net's weights; a tag has to be known too."""
    known = [*timm.list_models(), *timm.list_models(pretrained=True)]
    config = timm.get_pretrained_cfg(name) if name in known else None
    if config is None:
        close = get_close_matches(str(name), known, n=4)
        hint = f"close to it are {', '.join(close)}" if close else "timm.list_models() lists them"
        raise ValueError(f"model.name={name} is no net of timm {timm.__version__}; {hint}")
    return config


def _classifier(name: str) -> str:
    """Name of the one module that is a net's head."""
    found = _config(name).classifier
    if not isinstance(found, str):
        raise ValueError(f"model.name={name} has no head of its own, or several ({found}); choose a net with one")
    return found


def _places(config: PretrainedCfg) -> list[str]:
    """Addresses of a net's weights: at the Hugging Face hub, and where they were first published."""
    hub = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{config.hf_hub_filename or 'model.safetensors'}"
    return [place for place in (config.hf_hub_id and hub, config.url) if place and isinstance(place, str)]
