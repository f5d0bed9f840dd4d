"""What a stored configuration refers to: its own keys, in bounded memory, and nothing of its reader's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sent import change

from fedsparse.job import trust
from fedsparse.job.resume import read_job

SECRET = "5ecret-of-mine"


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:GATE_SECRET}",
        "${ oc.env : GATE_SECRET }",
        "x ${oc.env:GATE_SECRET} y",
        "${oc.${env}:GATE_SECRET}",
        "${oc.env:${its_name}}",
        "${${whole}}",
        "\\${oc.env:GATE_SECRET}",
        "${oc.select:nothing,${oc.env:GATE_SECRET}}",
        "${oc.select:${env}}",
        "${oc.decode:'${oc.env:GATE_SECRET}'}",
        "${oc.create:{a:'${oc.env:GATE_SECRET}'}}",
        "${oc.deprecated:its_name}",
        "${oc.dict.values:model}",
        "${hydra:runtime.cwd}",
        "${now:%Y}",
        "${cell:[a],[b]}",
        "${timm_head:${oc.env:GATE_SECRET}}",
        ["${oc.env:GATE_SECRET}"],
        {"deep": [{"er": "${oc.env:GATE_SECRET}"}]},
    ],
    ids=str,
)
def test_what_is_stored_does_not_reach_the_environment(sent_folder, monkeypatch, value):
    monkeypatch.setenv("GATE_SECRET", SECRET)
    change(sent_folder, env="env", its_name="GATE_SECRET", whole="oc.env:GATE_SECRET", model__name=value)
    before = dict(trust.BaseContainer._resolvers)
    with pytest.raises(ValueError, match="the stored configuration cannot be used") as refused:
        read_job(sent_folder)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert before == trust.BaseContainer._resolvers


def test_a_resolver_that_one_typed_oneself_is_trusted_by_its_name(sent_folder, monkeypatch):
    monkeypatch.setenv("GATE_SECRET", SECRET)
    change(sent_folder, model__name="${oc.env:GATE_SECRET}")
    with pytest.raises(ValueError, match=r"model.name: the resolver .* trust=\[oc.env\]"):
        read_job(sent_folder)
    assert read_job(sent_folder, trusted=["oc.env"]).cfg.model.name == SECRET


def test_what_hydra_stored_of_itself_is_plain_data(sent_folder, monkeypatch):
    monkeypatch.setenv("GATE_SECRET", SECRET)
    path = sent_folder / ".hydra" / "hydra.yaml"
    stored = yaml.safe_load(path.read_text())
    stored["hydra"]["runtime"]["choices"]["model"] = "${oc.env:GATE_SECRET}"
    stored["hydra"]["callbacks"] = {"evil": {"_target_": "os.system", "command": "id"}}
    path.write_text(yaml.safe_dump(stored))
    assert read_job(sent_folder).choices["model"] == "${oc.env:GATE_SECRET}"
    path.write_text("hydra: {runtime: [1]}")
    with pytest.raises(ValueError, match=r"hydra\.yaml cannot be read"):
        read_job(sent_folder)


def doubling(levels, one):
    lines = [f"a{k}: {one.replace('_', f'a{k + 1}')}" for k in range(levels)]
    return "\n".join([*lines, f"a{levels}: xxxxxxxx"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n".join(["a0: &a0 [x, x]", *(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 40))]), "alias"),
        (doubling(40, "${_}${_}"), "grow"),
        (doubling(40, "['${_}', '${_}']"), "grow"),
        (doubling(40, "{x: '${_}', y: '${oc.select:_,1}'}"), "grow"),
        ("a: ${b}\nb: ${a}", "refer to themselves"),
        ("a: {b: '${a}'}", "refer to themselves"),
        ("a: {b: '${..a}'}", "refer to themselves"),
        (doubling(40, "[0, '${_[1]}${_[-1]}']"), "grow"),
        (doubling(40, "{x: ['${_.x[-1]}${_.x.0}']}"), "grow"),
        ("k.1: '${[k.2]}${[k.2]}'\nk.2: x", "no plain reference|cannot be read"),
        ("a: " + "[" * 400_000, "more than 50 levels"),
        ("- " * 400_000, "more than 50 levels"),
        ("a: [" + "0, " * 40_000 + "0]", "20,000 values"),
        ("a: " + "x" * 2**20, "more than 1,048,576 bytes"),
        ("a: " + "9" * 5_000, "digits|not YAML"),
        ("a: 0x" + "f" * 5_000, "more than 64 bits"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: !!python/object/apply:os.system ['id > canary']", "could not determine a constructor|not YAML"),
        ("a: \x07\x00", "not YAML"),
        ("- 1", "no keys"),
        ("", "rounds"),
        ("{[1]: 2}", "unhashable|cannot be read"),
        ("a: '${'", "no plain reference|cannot be read|mismatched"),
    ],
)
def test_a_configuration_that_would_grow_or_is_none_is_one_line(sent_folder, text, said):
    (sent_folder / ".hydra" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        read_job(sent_folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert not Path("canary").exists()


def test_references_of_ones_own_stay_references(sent_folder):
    change(sent_folder, model__name="${seed}-${model.head}", mask__near="${.owner}", mask__up="${..seed}")
    cfg = read_job(sent_folder).cfg
    assert (cfg.model.name, cfg.mask.near, cfg.mask.up) == ("0-head.*", "global", 0)
    assert read_job(sent_folder, ["federation.rounds=7"]).cfg.phases.learn.rounds == 7
