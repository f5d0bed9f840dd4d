"""The model of a run, and whether it suits the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fedsparse.data.datasets import Dataset
from fedsparse.models.trainable import trainable_filter
from fedsparse.precisions import dtype_of
from fedsparse.space import ParamSpace, Patterns, matches


def build_net(cfg: DictConfig, dataset: Dataset) -> tuple[nn.Module, ParamSpace]:
    """Build the model and the space of its federated tensors; what is null in ``model.net`` is as the data has it."""
    net = instantiate(cfg.model.net, **_found(cfg, dataset)).to(dtype=dtype_of(cfg.trainer.precision))
    names = [name for name, _ in net.named_parameters()]
    chosen = trainable_filter(cfg.model.trainable, cfg.model.head, names)
    if cfg.head.frozen:
        chosen = _without(chosen, cfg.model.head, names)
    return net, ParamSpace.of(net, chosen, list(cfg.model.local))


def net_arguments(cfg: DictConfig, dataset: Dataset) -> dict[str, Any]:
    """Resolve ``model.net`` as a run builds it: plain values that ``make_net`` takes."""
    return {**OmegaConf.to_container(cfg.model.net, resolve=True), **_found(cfg, dataset)}  # type: ignore[dict-item]


def make_net(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network from what ``net_arguments`` gave."""
    net: nn.Module = instantiate(OmegaConf.create(dict(arguments)))
    return net


def _found(cfg: DictConfig, dataset: Dataset) -> dict[str, int]:
    """Fill in what is null in ``model.net`` from the data."""
    shape = tuple(dataset.train.x.shape[1:])  # (C, H, W), or (L,) of texts
    found = {
        "num_classes": dataset.classes,
        "in_chans": shape[0],
        "img_size": shape[-2:][0],
        "in_features": math.prod(shape),
    }
    return {k: v for k, v in found.items() if k in cfg.model.net and cfg.model.net[k] is None}


def _without(chosen: Callable[[str], bool], head: Patterns, names: Sequence[str]) -> Callable[[str], bool]:
    """Leave out the head's names."""
    if not any(chosen(name) and not matches(name, head) for name in names):
        raise ValueError(
            "head.frozen=true leaves nothing to train with this model.trainable; set one of them otherwise"
        )
    return lambda name: chosen(name) and not matches(name, head)


def check_classes(cfg: DictConfig, net: nn.Module, dataset: Dataset) -> None:
    """Refuse a head that cannot tell the classes of the data apart."""
    heads = [module for name, module in net.named_modules() if matches(f"{name}.weight", cfg.model.head)]
    outputs = next((head.out_features for head in heads if isinstance(head, nn.Linear)), dataset.classes)
    if outputs < dataset.classes:
        raise ValueError(
            f"the model's head has {outputs} outputs and the data {dataset.classes} classes; "
            f"set model.net.num_classes={dataset.classes}"
        )


def check_kind(cfg: DictConfig, net: nn.Module, dataset: Dataset) -> None:
    """Refuse texts for a model of images, images for one of texts, and what a model of texts cannot do.

    Raises:
        ValueError: one line that names the keys.

    """
    longest = getattr(net, "longest", None)  # of a model of texts, the most tokens that it takes
    if dataset.tokens and longest is None:
        fitting = "model=next_char_lstm" if dataset.vocabulary else "model=bert_tiny or model=bert_base"
        raise ValueError(f"this data is text and the model takes images; choose {fitting}")
    if longest is None:
        return
    characters = getattr(net, "vocabulary", 0)  # 0: words of a tokenizer
    if not dataset.tokens:
        fitting = "data=shakespeare" if characters else "data=stdlib_docs or data=ag_news"
        raise ValueError(f"this data is images and the model takes text; choose {fitting}")
    if dataset.vocabulary != characters:
        held, taken = (f"{n} characters" if n else "words of a tokenizer" for n in (dataset.vocabulary, characters))
        fitting = "model=next_char_lstm" if dataset.vocabulary else "model=bert_tiny or model=bert_base"
        raise ValueError(f"this data is {held} and the model takes {taken}; choose {fitting}")
    if dataset.train.x.shape[1] > longest:
        raise ValueError(f"data.max_length={dataset.train.x.shape[1]}: the model takes at most {longest} tokens")
    if cfg.federation.cohort not in (1, "auto"):
        raise ValueError("a model of texts cannot be stacked over clients; set federation.cohort=1")
