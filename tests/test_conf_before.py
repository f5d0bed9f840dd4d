"""No value of ``conf/`` is another one than before its nodes became flat: a value may move, none may change.

``conf_before.json`` holds what the last commit before composed, unresolved: the whole default, and of every option of
every group, experiments too, the parts that differ from it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composed import composed
from omegaconf import OmegaConf

from fedsparse.job.earlier import TARGETS, renewed
from fedsparse.job.keys import JOBS, target_of
from fedsparse.job.shipped import conf_dir, groups

pytestmark = pytest.mark.slow

BEFORE = json.loads(Path(__file__).with_name("conf_before.json").read_text(encoding="utf-8"))
DEFAULT = BEFORE.pop("")
# keys that a node has got since, which change no figure on a CPU
SINCE = {"federation": {"graph": True, "tf32": False}, "trainer": {"deterministic": False}}
SINCE |= {"schedule": {"within": "constant"}}
SINCE["federation"] |= {"eval_share": 1.0, "channels_last": False}
SINCE["model"] = {"checkpoint": None}
# the size to which images of a folder are brought, which was 224 for all
SIZES = {"vit_digits": None, "mlp": 32, "fednet": 28, "fednet_mlp": 28}
TIMM_SIZE = "${timm_size:${model.name},${oc.select:model.img_size,null}}"
MEANS = ("WeightedMean", "FedNova")  # the averages that have got a block since
# where a target of then stood in its group
NESTED = {"optimizer": "build", "server": "optimizer", "model": "net", "data": "source"}


def before(option):
    found = DEFAULT | BEFORE[option]
    if found["model"]["name"] == "dino_vits16":  # the one value that another takes over: the name that timm gives it
        found = found | {"model": found["model"] | {"name": found["model"]["net"]["name"]}}
    if found["model"]["name"] == "conv":  # the one value that has changed since: as large images were slower
        found = found | {"model": found["model"] | {"cohort": 4}}
    if found["federation"]["cohort"] == "${model.cohort}":  # as null is on a CPU
        found = found | {"federation": found["federation"] | {"cohort": None}}
    if option == "callbacks/early_stopping":  # as auto is where nothing stays with the clients
        stop = found["callbacks"]["early_stopping"]
        found = found | {"callbacks": {"early_stopping": stop | {"monitor": "auto"}}}
    if found["aggregation"]["_target_"].endswith(MEANS):
        found = found | {"aggregation": found["aggregation"] | {"block": 1}}
    timm = found["model"]["net"]["_target_"].endswith("timm_model")
    size = TIMM_SIZE if timm else SIZES.get(found["model"]["name"], 224)
    found = found | {"model": found["model"] | {"image_side": size}}
    if found["data"]["source"]["_target_"].endswith(".cifar10"):
        found = found | {"data": found["data"] | {"source": found["data"]["source"] | {"part": "all"}}}
    if wandb := found["logger"].get("wandb"):  # null is what W&B's own variables say, or the run
        since = dict.fromkeys(("entity", "group", "name", "tags", "notes", "job_type"))
        found = found | {"logger": found["logger"] | {"wandb": wandb | since}}
    if option == "data/imagefolder":
        source = found["data"]["source"] | {"size": "${oc.select:model.image_side,224}"}
        found = found | {"data": found["data"] | {"source": source}}
    return found | {group: found[group] | keys for group, keys in SINCE.items()}


def now(option):
    """Today's configuration; a group that is none any more has had one option."""
    group = option.split("/")[0]
    return composed(*[option.replace("/", "=")] if group in groups() else [])


def called(node, place=()):
    """What every target in a node is called with: (place, target, argument) -> value."""
    found = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if "_target_" in node and not isinstance(value, dict):
            found[(*place, node["_target_"], key)] = value
        found |= called(value, (*place, key))
    return found


def called_then(node):
    """The same of then; the arguments that have another name now have that."""
    return {(*place, {"source": "tokenizer"}.get(key, key)): value for (*place, key), value in called(node).items()}


def exchanged_then(node):
    """What sparsifier, filters and exchange got: payload, compat, and the rule with its options."""
    build = node["build"]
    filters = {f"{name}.{key}": value for name, got in build["filters"].items() for key, value in got.items()}
    kind = build["rule"] if "rule" in build else {"_target_": build["_target_"], "_partial_": build["_partial_"]}
    return filters, build["payload"], build.get("compat"), kind


def exchanged(node):
    """The same of now, as ``exchange_of`` deals it."""
    shared = {
        "attack._target_": "fedsparse.federation.exchange.sign_flip",
        "attack.clients": node["attackers"],
        "attack.scale": node["attack_scale"],
        "feedback._target_": "fedsparse.federation.exchange.feedback",
        "feedback.decay": node["feedback"],
        "precision._target_": "fedsparse.federation.exchange.precision",
        "precision.dtype": node["precision"],
    }
    kind = {key: value for key, value in node.items() if key not in set(JOBS["exchange"]) - {"compat"}}
    return shared, node["payload"], node.get("compat"), kind


def resolved(cfg):
    return OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)


def today(node):
    """The same with the names that classes have now."""
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    return {**node, "_target_": TARGETS.get(node["_target_"], node["_target_"])}


def test_no_option_of_then_has_gone_but_those_that_were_no_choice():
    listed = {f"{p.parent.name}/{p.stem}" for p in conf_dir().glob("*/*.yaml") if p.parent.name != "hydra"}
    assert {name.split("/")[0] for name in set(BEFORE) - listed}.isdisjoint(groups())


@pytest.mark.parametrize("option", list(BEFORE))
def test_what_was_stored_then_is_what_is_composed_now_and_every_target_gets_what_it_got(option):
    cfg = now(option)
    found = OmegaConf.to_container(cfg)
    found = {group: part for group, part in found.items() if group in before(option)}  # without groups that came since
    assert renewed(before(option)) == found
    assert list(renewed(before(option))["phases"]) == list(found["phases"])  # they take place in this order
    assert_called_alike(resolved(before(option)), cfg)


def assert_called_alike(then, cfg):
    """Compare what targets and the job get, read from both configurations alone, without the table of moves."""
    found = OmegaConf.to_container(cfg, resolve=True)
    assert exchanged_then(then["exchange"]) == exchanged(found["exchange"])
    for group in found:
        if group == "exchange":
            continue
        if group in NESTED:
            wanted = called_then(then[group][NESTED[group]])
            assert called(OmegaConf.to_container(target_of(group, cfg[group]))) == wanted
            for key in set(JOBS[group]) - {"name", "image_side"}:
                assert found[group].get(key) == then[group].get(key)
        elif group in then:
            wanted = today(then[group])
            assert found[group] == (SINCE[group] | wanted if group in SINCE else wanted)
