"""Stored configurations with anything in them: refused in one line, or accepted with nothing but what may be named."""

from __future__ import annotations

import os
import random
import shutil
import sys

import pytest
import yaml
from fuzzing import attempts, hammer
from omegaconf import OmegaConf

from fedsparse import run
from fedsparse.job import trust
from fedsparse.job.command import one_line
from fedsparse.job.resume import read_job, refuse_stored_overrides

pytestmark = pytest.mark.slow

SHORT = ["model=mlp", "logger=csv", "pictures=false", "federation.rounds=1", "federation.local_steps=1"]
SECRET = "5ecret-of-mine"
TARGETS = ["canary_module.touch", "os.system", "torch.load", "torch.optim.SGD", "fedsparse.job.summary.sha256", ""]
RESOLVERS = ["${oc.env:GATE_SECRET}", "${oc.${a}:GATE_SECRET}", "${seed}", "${oc.select:a,1}"]
RESOLVERS += ["${a}${a}", "${..a}", "${"]
WORDS = [*"|'\"{}[]-:#\t\0é~", "9" * 50, "-1", "1e400", ".nan", "null", "true", "0x" + "f" * 40, "&a x", "*a", "? a"]
WORDS += ["!!python/name:os.system", "!!binary aGk=", "%TAG", "---", "???"]
FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")


def flipped(text, draw):
    """Some bytes changed."""
    data = bytearray(text.encode())
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def swapped(text, draw):
    """Two words in each other's place."""
    words = text.split(" ")
    i, j = draw.randrange(len(words)), draw.randrange(len(words))
    words[i], words[j] = words[j], words[i]
    return " ".join(words).encode()


def replaced(text, draw):
    """A value in place of a word."""
    words = text.split(" ")
    for _ in range(draw.randint(1, 3)):
        words[draw.randrange(len(words))] = draw.choice([*WORDS, *RESOLVERS, *TARGETS])
    return " ".join(words).encode()


def moved(text, draw):
    """Lines dropped, doubled, or indented otherwise."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    lines[at : at + draw.randint(0, 3)] = draw.choice([[], [lines[at]] * 2, ["  " + lines[at]], [lines[at].lstrip()]])
    return "\n".join(lines).encode()


def named(text, draw):
    """A part somewhere in the tree."""
    tree = yaml.safe_load(text)
    places = [node for _, node in trust.nodes(tree) if isinstance(node, dict | list) and node]
    node = draw.choice(places)
    part = draw.choice([{"_target_": draw.choice(TARGETS), "path": "x"}, draw.choice(RESOLVERS), draw.choice(WORDS)])
    if isinstance(node, list):
        node.insert(draw.randrange(len(node)), part if draw.random() < 0.5 else f"+data.a={part}")
    else:
        node[draw.choice([*map(str, node), "_target_", "_args_", "a"])] = part
    return yaml.safe_dump(tree, allow_unicode=True).encode()


def nested(text, draw):
    """Levels without end, and references that multiply."""
    levels = draw.choice([10, 60, 5_000])
    grown = "".join(f"b{k}: '${{b{k + 1}}}${{b{k + 1}}}'\n" for k in range(60)) + "b60: xxxxxxxx\n"
    deep = draw.choice(["[", "{a: ", "- ", "? "]) * levels
    return (text + draw.choice([f"b: {deep}\n", grown, "c: " + "x, " * 400_000, f"d: {'9' * 6_000}\n"])).encode()


MUTATIONS = (flipped, swapped, replaced, moved, named, nested)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's folder, a function that leaves a trace where it is called, and a secret of the environment."""
    monkeypatch.chdir(tmp_path)
    run([*SHORT, f"hydra.run.dir={tmp_path / 'run'}"])
    (tmp_path / "canary_module.py").write_text("open('canary', 'w')\n\n\ndef touch(*_, **__):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GATE_SECRET", SECRET)
    return tmp_path / "run"


@pytest.mark.fuzz
def test_mutated_configurations_are_refused_or_name_nothing_else(folder):
    """2,000 with ``make fuzz``; beyond what the process holds at first they take at most 256 MB."""
    texts = {name: (folder / ".hydra" / name).read_text() for name in FILES}
    ours = set(trust.shipped().arguments)

    def attempt(index):
        draw = random.Random(index)
        name = draw.choices(FILES, [8, 1, 1])[0]
        mutate = draw.choice(MUTATIONS)
        (folder / ".hydra" / name).write_bytes(mutate(texts[name], draw))
        try:
            cfg, said = check(name), ""
        except ValueError as error:
            cfg, said = None, str(error)
        (folder / ".hydra" / name).write_text(texts[name])
        assert not (folder.parent / "canary").exists(), (name, mutate.__name__)
        if cfg is None:
            assert SECRET not in said
            assert len(said) < 1_000
            raise ValueError(said)
        for _, node in trust.nodes(cfg):
            assert not isinstance(node, dict) or node.get("_target_", "torch.optim.SGD") in ours
            assert not isinstance(node, str) or (SECRET not in node and "${" not in node)
        return "accepted"

    def check(name):
        if name == "overrides.yaml":
            try:
                refuse_stored_overrides(trust.overrides(folder))
            except Exception as error:  # as repeat prints it
                line = one_line(error)
                assert "HYDRA_FULL_ERROR" not in line, line
                raise ValueError(line) from error
            return {}
        return OmegaConf.to_container(read_job(folder, ["federation.rounds=2"]).cfg)

    ended = hammer(attempt, attempts(2_000))
    print(ended)
    assert "canary_module" not in sys.modules
    assert os.environ["GATE_SECRET"] == SECRET
    assert ended["refused"] > ended["accepted"] / 4 > 0
    shutil.rmtree(folder)
