"""Every key of ``conf/`` is typed in some test; those that no run of another test types reach their part here."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from composed import composed
from hydra.utils import instantiate
from leaf_json import texts, write_both
from pages import pages

from fedsparse.job import shipped
from fedsparse.job.assemble import assemble
from fedsparse.job.keys import JOBS, target_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAST = ["model=mlp", "logger=csv", "mask_rule=random", "federation.num_clients=2"]
PLAIN = (bool, int, float, str, list, type(None))
TYPED = [  # what it needs, and the key with another value
    ("callbacks=early_stopping", "callbacks.early_stopping.mode=min"),
    ("callbacks=early_stopping", "callbacks.early_stopping.monitor=train/loss"),
    ("exchange=layers", "exchange.normalise=false"),
    ("exchange=randomk", "exchange.seed=7"),
    ("", "link.down=5.0"),
    ("logger=tensorboard", "logger.tensorboard.name=events"),
    ("logger=tensorboard", "logger.tensorboard.version=two"),
    ("logger=wandb", "logger.wandb.entity=mine"),
    ("logger=wandb", "logger.wandb.group=mine"),
    ("logger=wandb", "logger.wandb.job_type=baseline"),
    ("logger=wandb", "logger.wandb.log_model=true"),
    ("logger=wandb", "logger.wandb.name=mine"),
    ("logger=wandb", "logger.wandb.notes=remark"),
    ("logger=wandb", "logger.wandb.offline=false"),
    ("logger=wandb", "logger.wandb.project=mine"),
    ("logger=wandb", "logger.wandb.tags=[a,b]"),
    ("mask_rule=least_sensitive", "mask_rule.fisher=batch"),
    ("mask_rule=least_sensitive", "mask_rule.labels=model"),
    ("model=fednet federation.cohort=1", "model.img_size=8"),
    ("model=conv", "model.in_chans=1"),
    ("", "model.in_features=64"),
    ("", "model.seed=5"),
    ("model=resnet18_gn", "model.stem=imagenet"),
    ("optimizer=adamw", "optimizer.decoupled=false"),
    ("phases=explore mask_rule=autoflip", "phases.explore.clients=2"),
    ("phases=explore mask_rule=autoflip explore.steps=null", "phases.explore.local_epochs=2"),
    ("phases=explore mask_rule=autoflip", "phases.explore.local_steps=7"),
    ("phases=explore mask_rule=autoflip", "phases.explore.lr=0.5"),
    ("phases=explore mask_rule=autoflip explore.steps=null explore.epochs=3", "phases.explore.patience=2"),
    ("phases=explore mask_rule=autoflip", "phases.explore.updates_model=true"),
    ("phases=explore mask_rule=autoflip", "phases.explore.weight=held"),
    ("phases=fine_tune", "phases.fine_tune.informs_mask=true"),
    ("", "phases.learn.informs_mask=false"),
    ("sparsity=shira", "sparsity.rank=1"),
    ("sparsity=gradual80", "sparsity.schedule.begin=3"),
    ("sparsity=gradual80", "sparsity.schedule.every=2"),
    (
        "model=vit_digits lora=r8 topology=departments topology.of=2 mixing=clusters mixing.of=A "
        "mixing.metric=euclidean mixing.k=elbow",
        "mixing.compat=original",
    ),
    ("model=vit_digits method=flora exchange=masked", "lora.ranks=[8,4]"),
    ("topology=departments topology.of=2 mixing=clusters mixing.of=row mixing.method=fixed", "mixing.fixed=[0,1]"),
    ("topology=departments topology.of=2 mixing=clusters mixing.of=row", "mixing.k_range=[2,3]"),
    ("trajectory=global", "trajectory.dtype=float16"),
    ("trajectory=global", "trajectory.every=3"),
]
DEALT = [
    ("partition=ratios", "partition.class_ratios=[[1,1],[3,1]]"),
    ("partition=ratios", "partition.fractions=[1.0,0.5]"),
    ("partition=unbalanced", "partition.keep=[0.5,0.6]"),
    ("partition=quantity", "partition.min_size=9"),
    ("partition=dirichlet_sampled", "partition.test=true"),
    ("partition=natural", "partition.users=[a,b]"),
]
LOADED = [
    ("data=stdlib_docs", "data.tokenizer=google-bert/bert-base-cased"),
    ("data=imagefolder", "data.test_fraction=0.3"),
    ("data=cifar10", "data.val_fraction=0.3"),
    ("data=cifar10", "data.split_seed=4"),
    ("data=cifar10", "data.part=a"),
]


def leaves(held, group):
    """Keys of plain values, below their group."""
    plain = {key for key, value in held.items() if isinstance(value, PLAIN) or not value}
    return {f"{group}.{key}" for key in plain if not any(part.startswith("_") for part in key.split("."))}


def keys():
    """Every key that a person may type, with a value of its own."""
    chosen = [group for group in shipped.groups() if group not in shipped.WHOLE]
    found = {key for group in chosen for o in shipped.options(group) for key in leaves(shipped.keys(group, o), group)}
    found |= {key for name, held in shipped.sections().items() for key in leaves(held, name)}
    return found | {key for key, value in shipped.main().items() if isinstance(value, PLAIN) and key != "defaults"}


def other(value):
    """Another value of the same kind; it is handed on, not used."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "typed"


def arguments(group, option):
    """Keys of an option's target with another value each."""
    node = shipped.keys(group, option)
    mine = set(JOBS.get(group, ())) | {"defaults"}
    return {
        f"{group}.{key}": other(value)
        for key, value in node.items()
        if isinstance(value, bool | int | float | str)
        and "." not in key
        and not key.startswith("_")
        and key not in mine
    }


CALLED = [
    (group, option)
    for group in shipped.groups()
    for option in shipped.options(group)
    if group not in shipped.WHOLE and "_target_" in shipped.keys(group, option) and arguments(group, option)
]


@pytest.mark.parametrize(("group", "option"), CALLED, ids=["/".join(pair) for pair in CALLED])
def test_what_is_typed_of_a_target_is_what_it_is_called_with(group, option):
    typed = arguments(group, option)
    cfg = composed(f"{group}={option}", *(f"{key}={value}" for key, value in typed.items()))
    node = target_of(group, cfg[group]) if group in JOBS else cfg[group]
    assert {f"{group}.{key}": node[key] for key in node if f"{group}.{key}" in typed} == typed


def test_every_key_is_typed_in_some_test():
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")] + list(pages().values())
    called = {key for pair in CALLED for key in arguments(*pair)}  # above
    by_hand = {key for key in keys() if any(re.search(rf"(?<![\w.]){re.escape(key)}=", t) for t in texts)}
    missing = sorted(keys() - by_hand - called)
    assert len(keys()) > 180
    assert missing == []


def test_the_jobs_keys_are_keys_of_conf():
    own = {f"{group}.{key}" for group, listed in JOBS.items() for key in listed}
    assert own - keys() == {"exchange.filters"}  # which are of one's own


def part_of(assembly, place):
    """What of an assembly a node of the configuration became."""
    group, *inner = place
    module = assembly.method.make_module(assembly.problem.net, 1)
    everything = torch.ones(assembly.problem.space.size, dtype=torch.bool)
    phases = {phase.name: phase for phase in assembly.course.phases.rounds}
    return {
        "callbacks": lambda: assembly.session.callbacks[0],
        "exchange": lambda: assembly.method.make_exchange(everything, lambda clients: None).rule,
        "link": lambda: assembly.method.link,
        "lora": lambda: assembly.method,
        "logger": lambda: assembly.session.loggers[inner[0]],
        "mask_rule": lambda: assembly.method.rule,
        "mixing": lambda: assembly.method.mixing,
        "model": lambda: assembly.problem.arguments,
        "optimizer": lambda: module.make_optimizer,
        "phases": lambda: phases[inner[0]],
        "trajectory": lambda: assembly.method.trajectory.func,
        "sparsity": lambda: assembly.method.sparsity.schedule if inner else assembly.method.sparsity,
    }[group]()


def held(part, key):
    """A value that a part was given."""
    if isinstance(part, partial):
        return part.keywords[key]
    return part[key] if isinstance(part, dict) else getattr(part, key)


def value_in(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


@pytest.mark.parametrize(("needs", "typed"), TYPED, ids=[typed for _, typed in TYPED])
def test_a_typed_value_reaches_its_part(needs, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = typed.partition("=")[0]
    default, cfg = composed(*FAST, *needs.split()), composed(*FAST, *needs.split(), typed)
    *place, last = key.split(".")
    assert value_in(default, key) != value_in(cfg, key)
    assert held(part_of(assemble(cfg), place), last) == value_in(cfg, key)


@pytest.mark.parametrize(("option", "typed"), [*DEALT, *LOADED], ids=[typed for _, typed in [*DEALT, *LOADED]])
def test_a_typed_value_is_an_argument_of_what_deals_or_loads(option, typed):
    group, last = typed.partition("=")[0].split(".")
    default, cfg = composed(*FAST, option), composed(*FAST, option, typed)
    node = target_of(group, cfg[group]) if group in JOBS else cfg[group]
    assert default[group][last] != cfg[group][last]
    called = instantiate(node, _partial_=True).keywords
    assert called[last] == cfg[group][last]


def test_a_phase_in_which_clients_learn_nothing_is_refused():
    """So ``true`` is the one value of this key."""
    with pytest.raises(ValueError, match=r"phases\.fine_tune\.updates_model is false"):
        assemble(composed(*FAST, "phases=fine_tune", "phases.fine_tune.updates_model=false"))


def test_an_unknown_character_is_what_was_typed(tmp_path):
    def plays(first):
        return lambda count, seed: ([first + text[1:] for text in texts(count, seed)[0]], texts(count, seed)[1])

    roots = [write_both(tmp_path / name, plays(first)) for name, first in (("odd", "#"), ("known", "Z"))]
    shown = [composed(*FAST, "data=shakespeare", f"data.root={root}", "data.unknown=Z") for root in roots]
    odd, known = (instantiate(target_of("data", cfg.data)).train.x for cfg in shown)
    assert torch.equal(odd, known)


def test_filters_of_ones_own_see_an_update_after_the_others():
    mine = "+exchange.filters.mine={_target_:fedsparse.federation.exchange.SignFlip,clients:1,scale:2.0}"
    cfg = composed(*FAST, "exchange.attackers=2", "exchange.precision=float16", mine)
    everything = assemble(cfg)
    made = everything.method.make_exchange(torch.ones(everything.problem.space.size, dtype=torch.bool), None)
    assert [type(chosen).__name__ for chosen in made.filters][0::2] == ["SignFlip", "SignFlip"]
    assert [chosen.scale for chosen in made.filters[0::2]] == [10.0, 2.0]
