"""The README's three steps work as printed, and what it names exists."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from composed import composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep

from fedsparse.job import shipped
from fedsparse.job.config import check
from fedsparse.job.limits import ALLOWED
from fedsparse.job.typed import check_typed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN = ("most_salient", "heaviest")  # options that a reader adds


def steps():
    """The three code blocks of the section on rules in the package: class, YAML, row."""
    section = README.split("## Add a mask rule to the package")[1].split("\n## ")[0]
    blocks = re.findall(r"   ```\w+\n(.*?)   ```", section, flags=re.DOTALL)
    assert len(blocks) == 3
    return [textwrap.dedent(block) for block in blocks[:2]] + [blocks[2]]


@pytest.fixture
def copy(tmp_path):
    for name in ("fedsparse", "conf", "tests", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    rule, option, row = steps()
    (tmp_path / "fedsparse/masks/rules/saliency.py").write_text(rule)
    (tmp_path / "conf/mask_rule/most_salient.yaml").write_text(option)
    table = tmp_path / "tests/masks/test_mask_rules.py"
    table.write_text(table.read_text().replace("RULES = {", "RULES = {\n" + row.rstrip("\n"), 1))
    return tmp_path


def call(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_mask_rule_in_three_steps(copy):
    where = call(copy, "-c", "import fedsparse; print(fedsparse.__file__)").strip()
    assert Path(where).is_relative_to(copy)
    report = call(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/masks/test_mask_rules.py", "-k", "most_salient"
    )
    assert int(re.search(r"(\d+) passed", report)[1]) >= 8
    options = ("model=mlp", "logger=csv", "federation.rounds=1", "calibration.head_steps=2")
    assert "mask rule most_salient" in call(copy, "-m", "fedsparse.train", "mask_rule=most_salient", *options)


def test_a_federation_from_python_runs_as_printed(capsys):
    """The model that it ends with is that of the script beside it, to the bit."""
    section = README.split("## From Python, without Hydra")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert 12 <= len([line for line in block.splitlines() if line.strip()]) <= 20
    printed = {}
    torch.manual_seed(0)
    exec(block, printed)
    script = runpy.run_path(str(ROOT / "tests/examples/plain_federation.py"), run_name="__main__")
    rows = [torch.cat([p.detach().flatten() for p in ran["net"].parameters()]) for ran in (printed, script)]
    assert torch.equal(*rows)
    lines = capsys.readouterr().out.splitlines()
    assert [f"{float(line):.3f}" for line in lines[:5]] == [line.split()[3].strip(",") for line in lines[5:]]


def test_the_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + ["notebooks/01_first_run.ipynb", "fedsparse/masks/rules"]:
        assert (ROOT / name).exists(), name


def test_the_options_that_the_readme_names_exist():
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    named = [(g, o) for g, o in re.findall(r"(?<![\w.])(\w+)=(\w+)", README) if g in groups and o not in OWN]
    assert len(named) > 10
    for group, option in named:
        assert (ROOT / "conf" / group / f"{option}.yaml").exists(), f"{group}={option}"


def printed_commands():
    """What the README types after ``python -m fedsparse.train``: lists of words, without flags and comments."""
    text = README.replace("\\\n", " ")
    lines = re.findall(r"python -m fedsparse\.train ([^`\n]*)", text)
    typed = [shlex.split(line.replace("<run>", "runs/a"), comments=True) for line in lines]
    return [[word for word in words if "=" in word and word != "mask_rule=most_salient"] for words in typed]


def cells(words):
    """Every value of a swept word, each beside the first of the others; what a sweeper draws is left out."""
    parsed = [OverridesParser.create().parse_override(word) for word in words]
    listed = [
        [f"{o.key_or_group}={v}" for v in o.value().list] if isinstance(o.value(), ChoiceSweep) else [word]
        for o, word in zip(parsed, words, strict=True)
        if isinstance(o.value(), ChoiceSweep) or not o.is_sweep_override()
    ]
    for place, values in enumerate(listed):
        yield from ([v if i == place else own[0] for i, own in enumerate(listed)] for v in values[place > 0 :])


def of_conf(words):
    """Whether all options are shipped ones; tests/test_outside.py types those of one's own."""
    return bool(words) and not any(word.endswith(f"={own}") for word in words for own in OWN)


@pytest.mark.parametrize("words", [words for words in printed_commands() if of_conf(words)], ids=" ".join)
def test_every_command_of_the_readme_composes(words):
    words = [word for word in words if not word.startswith(("resume=", "hydra"))]
    for cell in cells(words):
        check_typed(cell)
        check(composed(*cell))


ONES_OWN = ("exchange.filters.mine._target_", "mask_rule._target_", "client._target_")
ONES_OWN += ("exchange.x", "model.net.hidden")  # which are said to be refused


@pytest.mark.parametrize("file", ["README.md", "Makefile", "notebooks/01_first_run.ipynb", "notebooks/02_masks.ipynb"])
def test_every_key_that_is_printed_is_one_of_conf(file):
    text, groups = (ROOT / file).read_text(encoding="utf-8"), (*shipped.groups(), *shipped.sections())
    typed = set(re.findall(r"(?<![\w./<$({])\+?(\w+\.[\w.]+)=", text))
    known = {*shipped.settable(), *(f"trainer.{key}" for key in ALLOWED), *ONES_OWN}
    assert {key for key in typed if key.split(".")[0] in groups} - known == set()
    named = set(re.findall(r"`((?:\w+\.)+\w+)`", text)) if file == "README.md" else set()
    named = {key for key in named if not key.endswith((".json", ".png", ".safetensors"))}
    assert {key for key in named if key.split(".")[0] in (*shipped.sections(), "model", "server")} - known == set()
    assert len(typed) > (20 if file == "README.md" else 0)


def test_no_figure_is_a_placeholder():
    assert not re.search(r"\b(TODO|TBD|XXX|RESULTS|BENCH)\b", README)
