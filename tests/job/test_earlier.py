"""A run folder of an earlier version goes on as it began."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from composed import composed
from omegaconf import OmegaConf

from fedsparse import repeat, run
from fedsparse.analysis.folders import read_runs
from fedsparse.job.earlier import IMPLIED, KEYS, TARGETS, renewed, typed_now
from fedsparse.job.keys import JOBS
from fedsparse.job.trust import shipped
from fedsparse.job.unread import check_keys

NC2 = ["partition=noniid_nc2", "federation.num_clients=8", "mask_rule=random"]


def test_a_run_of_before_clients_were_even_keeps_its_clients(run_in):
    """Its configuration has no partition.even; today's default deals one class of these clients otherwise."""
    whole, _ = run_in("whole", *NC2, "partition.even=false")
    even, _ = run_in("even", *NC2)
    assert even["global_sha256"] != whole["global_sha256"]
    _, folder = run_in("old", *NC2, "partition.even=false", "federation.rounds=2")
    stored = folder / ".hydra" / "config.yaml"
    cfg = yaml.safe_load(stored.read_text(encoding="utf-8"))
    del cfg["partition"]["even"]
    stored.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
    assert run([f"resume={folder}", "federation.rounds=3"])["global_sha256"] == whole["global_sha256"]


def test_what_was_stored_wins():
    stored = {
        "partition": {"_target_": "fedsparse.data.partition.classes_per_client", "even": True},
        "list": [{"a": 1}],
    }
    assert renewed(stored) == stored


@pytest.mark.parametrize(("then", "now"), [(32, "32-true"), ("bf16", "bf16-mixed"), ("16-mixed", "16-mixed")])
def test_lightnings_short_names_of_a_precision_are_read(then, now):
    assert renewed({"_target_": "lightning.Trainer", "precision": then})["precision"] == now


def test_a_run_of_before_exchanges_were_one_class_goes_on(run_in):
    """Then a sparse exchange was a class of its own, and its rules stood in another file."""
    options = ["mask_rule=dense", "aggregation=coordinate_mean", "exchange=topk", "exchange.fraction=0.1"]
    whole, _ = run_in("whole", *options)
    _, folder = run_in("old", *options, "federation.rounds=2")
    stored = folder / ".hydra" / "config.yaml"
    text = stored.read_text(encoding="utf-8")
    flat = "  _target_: fedsparse.federation.exchange.TopK\n"
    rule = "    rule:\n      _target_: fedsparse.federation.selection.TopK\n      fraction: ${exchange.fraction}\n"
    build = "  build:\n    _target_: fedsparse.federation.exchange.Sparse\n    _partial_: true\n"
    old = text.replace(flat, build + rule)
    assert text.count(flat) == 1
    stored.write_text(old, encoding="utf-8")
    assert run([f"resume={folder}", "federation.rounds=3"])["global_sha256"] == whole["global_sha256"]


def test_a_run_of_before_departments_had_more_keys_goes_on(run_in):
    """Then the share of the mean of all was an option of the clusters, and departments were even blocks."""
    options = ["mask_rule=random", "topology=departments", "topology.of=2", "mixing=clusters", "mixing.of=row"]
    whole, _ = run_in("whole", *options, "mixing.k=2", "topology.global_mix=0.5")
    _, folder = run_in("old", *options, "mixing.k=2", "topology.global_mix=0.5", "federation.rounds=2")
    stored = folder / ".hydra" / "config.yaml"
    cfg = yaml.safe_load(stored.read_text(encoding="utf-8"))
    cfg["mixing"]["global_share"] = cfg["topology"].pop("global_mix")
    newer = {"topology": ("clients_per_department", "clusters_within"), "mixing": ("fixed", "compat")}
    for group, key in [(group, key) for group, keys in newer.items() for key in keys] + [("schedule", "within")]:
        del cfg[group][key]
    stored.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
    typed = folder / ".hydra" / "overrides.yaml"
    typed.write_text(typed.read_text(encoding="utf-8").replace("topology.global_mix", "mixing.global_share"))
    assert run([f"resume={folder}", "federation.rounds=3"])["global_sha256"] == whole["global_sha256"]


def test_the_names_of_now_are_those_of_conf():
    for target, keys in KEYS.items():
        assert set(keys) <= shipped().arguments[target]
    assert set(TARGETS.values()) <= {*shipped().arguments, *IMPLIED.values()}


def composed_then(**parts):
    """What the last commit before composed, of every option in ``conf_before.json``."""
    return json.loads((Path(__file__).parents[1] / "conf_before.json").read_text(encoding="utf-8"))[""] | parts


def test_an_argument_that_was_typed_for_a_target_alone_is_the_value_now():
    then = composed_then()
    then["optimizer"]["build"] |= {"lr": 0.3, "maximize": True}
    then["model"]["net"] |= {"seed": 7, "depth": "${model.net.seed}"}
    now = renewed(then)
    assert (now["optimizer"]["lr"], now["optimizer"]["maximize"]) == (0.3, True)
    assert (now["model"]["seed"], now["model"]["depth"]) == (7, "${model.seed}")
    assert renewed(now) == now


def test_what_cannot_be_said_any_more_is_left_where_it_stood():
    """A net's own argument that is called as a key of the job's, and an exchange of one's own with a rule."""
    then = composed_then()
    then["model"]["net"]["head"] = "linear"
    build = {"_target_": "mine.Exchange", "_partial_": True, "rule": {"_target_": "mine.Rule", "k": 3}}
    then["exchange"] |= {"build": build}
    now = renewed(then)
    assert now["model"]["net"] == {"head": "linear"}
    assert now["model"]["head"] == "head.*"
    assert "mine.Rule" in str(now["exchange"]["build"])
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    for group in ("model", "exchange"):
        with pytest.raises(ValueError, match=rf"there is no key {group}\.(net|build)\S*; it is {group} now"):
            check_keys(OmegaConf.merge(cfg, {group: now[group]}), {})


def test_filters_of_ones_own_stay_and_a_rule_is_the_target():
    then = composed_then()
    then["exchange"]["build"] |= {"rule": {"_target_": "fedsparse.federation.selection.TopK", "fraction": {0: 0.5}}}
    then["exchange"]["build"]["filters"]["mine"] = {"_target_": "mine.Filter"}
    then["exchange"]["build"]["filters"]["feedback"]["decay"] = 0.5
    values = {"payload": "change", "feedback": 0.5, "precision": None, "attackers": None, "attack_scale": 10.0}
    target = {"_target_": "fedsparse.federation.exchange.TopK", "fraction": {0: 0.5}}
    assert renewed(then)["exchange"] == values | target | {"filters": {"mine": {"_target_": "mine.Filter"}}}


def test_reports_and_repeats_read_a_run_of_then(run_in, tmp_path):
    """Its configuration and what was typed for it are rewritten as the last commit before stored them."""
    _, folder = run_in("sweep/a", "mask_rule=random", "model.hidden=8", "federation.rounds=1", "seed=1")
    (now,), _ = read_runs([folder], renewed)
    stored = folder / ".hydra" / "config.yaml"
    cfg = yaml.safe_load(stored.read_text(encoding="utf-8"))
    for group, inner in (("optimizer", "build"), ("model", "net")):
        got = {key: cfg[group].pop(key) for key in list(cfg[group]) if key not in (*JOBS[group], "lr")}
        cfg[group][inner] = got | ({"lr": "${optimizer.lr}"} if "lr" in cfg[group] else {})
    stored.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
    typed = folder / ".hydra" / "overrides.yaml"
    typed.write_text(typed.read_text(encoding="utf-8").replace("model.hidden", "model.net.hidden"), encoding="utf-8")
    (then,), _ = read_runs([folder], renewed)
    assert then.config == now.config
    assert read_runs([folder])[0][0].config != now.config
    repeat.main([str(tmp_path / "sweep"), "--seeds", "2"])
    (other,) = [path for path in (tmp_path / "sweep").glob("*/.hydra/config.yaml") if path.parents[1] != folder]
    assert "model.net.hidden-8" in other.parents[1].name
    assert yaml.safe_load(other.read_text(encoding="utf-8"))["model"]["hidden"] == 8


@pytest.mark.parametrize(
    "then",
    [
        {"server": 3},
        {"server": {"optimizer": None}},
        {"model": {"net": {}}},
        {"data": {"root": 3, "source": {"root": {"a": 1}}}},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_renewed_to_something_that_can_be_refused(then):
    assert renewed(then).keys() == then.keys()


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("model.net.hidden=8", "model.hidden=8"),
        ("+model.net.source=x", "+model.tokenizer=x"),
        ("~model.net.seed", "~model.seed"),
        (
            "exchange.build.filters.attack.scale=${exchange.build.rule.fraction}",
            "exchange.attack_scale=${exchange.fraction}",
        ),
        (
            "data.source.checkpoint=${oc.select:model.net.checkpoint,null}",
            "data.checkpoint=${oc.select:model.checkpoint,null}",
        ),
        ("exchange.fraction=0.1", "exchange.fraction=0.1"),
        ("mask_rule=random", "mask_rule=random"),
    ],
)
def test_what_was_typed_then_is_typed_now(then, now):
    assert typed_now([then, "trainer=default", "seed=1"]) == [now, "seed=1"]
