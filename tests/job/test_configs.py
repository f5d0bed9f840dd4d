"""Every option under conf/ composes and instantiates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedsparse.job.config import register_resolvers
from fedsparse.job.keys import JOBS, target_of
from fedsparse.job.shipped import WHOLE, conf_dir
from fedsparse.job.trust import admitted

CONF = conf_dir()
OPTIONS = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.glob("*/*.yaml"))
# what an option cannot be built without
NEEDS = {
    "mask_rule/from_file": ["mask_rule.path=mask.safetensors"],
    "data/arrays": ["data.root=nowhere"],
    **{f"data/{n}": ["data.root=nowhere"] for n in ("imagefolder", "femnist", "shakespeare")},
    **{f"experiment/autoflip_{n}": ["data.root=nowhere"] for n in ("femnist", "shakespeare")},
    "model/timm": ["model.name=resnet18", "model.pretrained=false"],
    "model/dino_vits16": ["model.pretrained=false"],
    "data/stdlib_docs": ["model=bert_tiny"],
    "data/docs_answers": ["model=qwen_tiny"],
    **{f"data/{n}": ["data.root=nowhere", "model=qwen_tiny"] for n in ("instructions", "plain_texts")},
    "objective/scaffold": ["objective.num_clients=5"],  # null is filled in with the clients that hold data
}
# what is null in a model because the data decides it
FOUND = {"num_classes": 10, "in_chans": 1, "img_size": 8, "in_features": 64}
# options that read files or start services when they are built: composed only
COMPOSED_ONLY = {
    "data/arrays",
    *(f"data/{n}" for n in ("cifar10", "cifar100", "mnist", "fashion_mnist", "imagefolder", "ag_news")),
    *(f"data/{n}" for n in ("femnist", "shakespeare", "instructions", "plain_texts")),
    *(f"model/{n}" for n in ("bert_base", "qwen")),
}
# groups of plain values: nothing in them is built by itself
PLAIN = ("phases", *WHOLE)


@pytest.fixture
def composed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("train", overrides=list(overrides))


def build_all(node):
    """Instantiate every ``_target_`` that stands highest in a node."""
    if not OmegaConf.is_config(node):
        return []
    if OmegaConf.is_dict(node) and "_target_" in node:
        return [instantiate(node, **{key: FOUND[key] for key in FOUND if key in node and node[key] is None})]
    values = node.values() if OmegaConf.is_dict(node) else node
    return [built for value in values for built in build_all(value)]


# nothing beside what a run has anyway
EMPTY = ("logger/csv", "callbacks/none", "evaluation/global")
EMPTY += tuple(f"{group}/none" for group in ("trajectory", "lora", "mixing", "merging"))


def test_there_are_options():
    assert len(OPTIONS) > 40


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_passes_the_gate_of_stored_configurations_and_instantiates(composed, option):
    group, name = option.split("/")
    cfg = composed(f"{group}={name}", *NEEDS.get(option, []))
    assert admitted(OmegaConf.to_container(cfg)) == OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if option not in COMPOSED_ONLY:
        node = target_of(group, cfg[group]) if group in JOBS else cfg.get(group)
        built = build_all(node)
        assert built or group in PLAIN or option in EMPTY


def test_every_group_has_a_default(composed):
    groups = {path.name for path in Path(CONF).iterdir() if path.is_dir()}
    assert groups - {*WHOLE, "hydra"} <= set(composed())
