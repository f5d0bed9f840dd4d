"""Builds the model of a run, and checks it against the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fedsparse.core.space import ParamSpace, Patterns, matches
from fedsparse.data.datasets import Dataset
from fedsparse.data.files import reason_of
from fedsparse.models.modes import evaluating
from fedsparse.models.text_net import TextNet
from fedsparse.models.trainable import trainable_filter

NORMS = (WeightNorm, SpectralNorm)  # torch's older form: hooks that compute the weight before each forward


def build_net(
    built: nn.Module,
    dtype: torch.dtype | None,
    head: Patterns,
    *,
    trainable: Any = "all",
    local: Sequence[str] = (),
    init: str = "random",
    frozen: bool = False,
) -> tuple[nn.Module, ParamSpace]:
    """Convert a network's parameters, and build the space of its federated tensors.

    Args:
        built: the network of the builder.
        dtype: of its parameters; None: unchanged.
        head: patterns of the head's parameters.
        trainable: ``model.trainable``: which parameters train.
        local: patterns of parameters that stay with each client.
        init: ``head.init``.
        frozen: ``head.frozen``: whether the head does not train.

    Raises:
        ValueError: a parameter cannot be part of a row, no parameter trains, or ``local`` matches none.

    """
    net = built.to(dtype=dtype)
    check_parameters(net)
    names = [name for name, _ in net.named_parameters()]
    builder_frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    check_frozen_head(init, head, builder_frozen)
    chosen = trainable_filter(trainable, head, names, builder_frozen)
    check_local(local, names)
    return net, ParamSpace.of(net, _without(chosen, head, names) if frozen else chosen, list(local))


def check_local(local: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a pattern of ``model.local`` that matches no parameter: with a typing error all would be shared.

    Raises:
        ValueError: one line with the pattern and some names.

    """
    for pattern in local:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"model.local={pattern} matches no parameter of the model, such as {', '.join(names[:3])}")


def make_net(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network from ``Problem.arguments``."""
    net: nn.Module = instantiate(OmegaConf.create(dict(arguments)))
    return net


def of_data(dataset: Dataset) -> dict[str, int]:
    """Derive sizes of a model from the data, by the names of the builder's arguments."""
    shape = tuple(dataset.train.x.shape[1:])  # (C, H, W), or (L,) of texts
    return {
        "num_classes": dataset.classes,
        "in_chans": shape[0],
        "img_size": shape[-2:][0],
        "in_features": math.prod(shape),
    }


def _without(chosen: Callable[[str], bool], head: Patterns, names: Sequence[str]) -> Callable[[str], bool]:
    """Exclude the head's parameters from a filter of names.

    Raises:
        ValueError: no other parameter trains.

    """
    if not any(chosen(name) and not matches(name, head) for name in names):
        raise ValueError(
            "head.frozen=true leaves nothing to train with this model.trainable; set one of them otherwise"
        )
    return lambda name: chosen(name) and not matches(name, head)


def check_parameters(net: nn.Module) -> None:
    """Refuse parameters without values, of half or complex dtype, or that share memory.

    Raises:
        ValueError: one line with the first such parameter.

    """
    owners: dict[int, str] = {}
    for name, parameter in net.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"the model's {name} has no values yet; let the builder make them")
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the model's {name} is {parameter.dtype}; clients train float32 (trainer.precision)")
        address = parameter.data_ptr()
        other = owners.setdefault(address, name) if parameter.numel() else name
        if other != name:
            raise ValueError(f"the model's {other} and {name} share memory and are two parameters; tie them as one")


def check_frozen_head(init: str, head: Patterns, frozen: Collection[str]) -> None:
    """Refuse ``head.init`` for a head that the builder froze.

    Raises:
        ValueError: one line with the key.

    """
    head_frozen = [name for name in frozen if matches(name, head)]
    if head_frozen and init != "random":
        raise ValueError(
            f"head.init={init} would change {head_frozen[0]}, which the model's builder froze (requires_grad=False); "
            "set head.init=random"
        )


def check_parametrized(net: nn.Module) -> None:
    """Refuse to prune weights that are computed from other parameters, since a zero vector has no direction.

    Raises:
        ValueError: one line with the layer.

    """
    for name, module in net.named_modules():
        if parametrize.is_parametrized(module) or any(isinstance(h, NORMS) for h in module._forward_pre_hooks.values()):
            raise ValueError(
                f"sparsity.mode=prune sets parameters to zero, and the weight of {name or 'the model'} is computed "
                "from its own (weight_norm, spectral_norm or another parametrization): set sparsity.mode=freeze, or "
                "build the model without it"
            )


def check_classes(net: nn.Module, head: Patterns, dataset: Dataset) -> None:
    """Refuse a head with fewer outputs than the data has classes.

    Raises:
        ValueError: one line with both numbers.

    """
    heads = [module for name, module in net.named_modules() if matches(f"{name}.weight", head)]
    outputs = next((layer.out_features for layer in heads if isinstance(layer, nn.Linear)), dataset.classes)
    if outputs < dataset.classes:
        raise ValueError(
            f"the model's head has {outputs} outputs and the data {dataset.classes} classes; "
            f"set model.num_classes={dataset.classes}"
        )


def check_kind(net: nn.Module, dataset: Dataset, cohort: int | str) -> None:
    """Refuse text for a model of images and the reverse, other targets, another vocabulary, long texts, and stacking.

    Raises:
        ValueError: one line with the keys.

    """
    fitting = "model=next_char_lstm" if dataset.vocabulary else "model=bert_tiny or model=bert_base"
    fitting = "model=qwen_tiny or model=qwen" if dataset.sequences else fitting
    if not isinstance(net, TextNet):
        if dataset.tokens:
            raise ValueError(f"this data is text and the model takes images; choose {fitting}")
        return
    if not dataset.tokens:
        texts = "data=shakespeare" if net.vocabulary else "data=stdlib_docs or data=ag_news"
        texts = "data=docs_answers or data=instructions" if net.sequences else texts
        raise ValueError(f"this data is images and the model takes text; choose {texts}")
    if dataset.sequences != net.sequences:
        wanted, given = ("the next token of each place", "the class of a text")[:: 1 if dataset.sequences else -1]
        raise ValueError(f"this data asks for {wanted} and the model tells {given}; choose {fitting}")
    if dataset.vocabulary != net.vocabulary:
        present, accepted = (
            f"{n} characters" if n else "words of a tokenizer" for n in (dataset.vocabulary, net.vocabulary)
        )
        raise ValueError(f"this data is {present} and the model takes {accepted}; choose {fitting}")
    if dataset.train.x.shape[1] > net.longest:
        raise ValueError(f"data.max_length={dataset.train.x.shape[1]}: the model takes at most {net.longest} tokens")
    if cohort not in (1, "auto") and not net.stackable:
        raise ValueError("this model of texts cannot be stacked over clients; set federation.cohort=1")


def check_head(init: str, dataset: Dataset) -> None:
    """Refuse to prepare a head of classes where there are none.

    Raises:
        ValueError: one line with the key.

    """
    if dataset.sequences and init != "random":
        raise ValueError(
            f"head.init={init} prepares a head of classes, and these targets are sequences: set head.init=random"
        )


def check_fit(
    net: nn.Module, dataset: Dataset, inputs: Callable[[Tensor], Tensor], precision: str, name: str, sized: bool
) -> None:
    """Refuse data of a shape or dtype that the model does not take, by a trial on one sample of zeros.

    Args:
        net: the network.
        dataset: the splits.
        inputs: converts samples to the network's inputs.
        precision: ``trainer.precision``.
        name: of the model, for the message.
        sized: whether ``data.size`` can be set.

    Raises:
        ValueError: one line with the model, the shape and the keys.

    """
    first = next(net.parameters())
    x = torch.zeros(1, *dataset.train.x.shape[1:], dtype=dataset.train.x.dtype)
    if x.is_floating_point() and x.dtype != first.dtype:
        if precision != "64-true":
            raise ValueError(
                f"the data is {x.dtype} and the model {first.dtype}; data._target_ has to give {first.dtype}"
            )
        x = x.to(first.dtype)
    try:
        with evaluating(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
            net(inputs(x).to(first.device))
    except Exception as error:  # the network's code may raise any exception
        shape = " x ".join(map(str, dataset.train.x.shape[1:]))
        ways = "model=conv takes any, model=timm resizes them" if not dataset.tokens else "set data.max_length"
        where = "data.size, " if sized else ""
        raise ValueError(
            f"the model {name} does not take data of {shape} ({reason_of(error)}); "
            f"choose {where}other data or another model: {ways}"
        ) from error
