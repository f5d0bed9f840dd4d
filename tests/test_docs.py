"""What README and ``docs/`` print works: commands compose and run, keys, options, files, targets and figures exist."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from composed import composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from pages import ROOT, blocks, pages, section

from fedsparse.job import shipped
from fedsparse.job.config import check
from fedsparse.job.limits import ALLOWED
from fedsparse.job.typed import check_typed

README, OUTSIDE = pages()["README.md"], ROOT / "tests" / "outside"
OWN = ("most_salient", "heaviest", "mine", "tanh", "bright_rows", "bright_columns")
OWN += ("blocks", "smoothed", "growing", "midrange")


def steps():
    """The three code blocks of the section on rules in the package: class, YAML, row."""
    text = section("CONTRIBUTING.md", "Add a mask rule to the package")
    found = re.findall(r"^```\w+\n(.*?)^```", text, flags=re.DOTALL | re.M)
    assert len(found) == 3
    return found


@pytest.fixture
def copy(tmp_path):
    for name in ("fedsparse", "conf", "tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml"):
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


@pytest.mark.soak
@pytest.mark.slow
def test_a_mask_rule_in_three_steps(copy):
    where = call(copy, "-c", "import fedsparse; print(fedsparse.__file__)").strip()
    assert Path(where).is_relative_to(copy)
    report = call(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/masks/test_mask_rules.py", "-k", "most_salient"
    )
    assert int(re.search(r"(\d+) passed", report)[1]) >= 8
    options = ("model=mlp", "logger=csv", "federation.rounds=1", "calibration.head_steps=2")
    assert "iid, most_salient 80% frozen" in call(copy, "-m", "fedsparse.train", "mask_rule=most_salient", *options)


def test_a_federation_from_python_runs_as_printed(capsys):
    """The model that it ends with is that of the script beside it, to the bit."""
    text = section("docs/how-to/python.md", "Build a federation without Hydra")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert 12 <= len([line for line in block.splitlines() if line.strip()]) <= 20
    printed = {}
    torch.manual_seed(0)
    exec(block, printed)
    script = runpy.run_path(str(ROOT / "tests/examples/plain_federation.py"), run_name="__main__")
    rows = [torch.cat([p.detach().flatten() for p in ran["net"].parameters()]) for ran in (printed, script)]
    assert torch.equal(*rows)
    lines = capsys.readouterr().out.splitlines()
    assert [f"{float(line):.3f}" for line in lines[:5]] == [line.split()[3].strip(",") for line in lines[5:]]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert len(README.split()) <= 2500


WRITTEN = ("notebooks/", "reference/api/", "reference/configuration.md", "reference/commands.md")  # by docs/hooks


@pytest.mark.parametrize("page", pages())
def test_the_files_that_a_page_names_exist(page):
    folder = (ROOT / page).parent
    for name in re.findall(r"\]\((?!\w+:)([\w./-]+)(?:#[\w-]+)?\)", pages()[page]):
        inside = os.path.relpath(folder / name, ROOT / "docs")
        assert (folder / name).exists() or inside.startswith(WRITTEN), name


@pytest.mark.parametrize("page", pages())
def test_the_options_that_a_page_names_exist(page):
    text, groups = pages()[page], shipped.groups()
    named = [(g, o) for g, o in re.findall(r"(?<![\w.])(\w+)=(\w+)", text) if g in groups and o not in OWN]
    assert page != "README.md" or len(named) > 10
    for group, option in named:
        assert option in shipped.options(group), f"{group}={option}"


def typed_words(line):
    """Words of a command as a shell reads them, without comments."""
    return shlex.split(line.replace("<run>", "runs/a").replace("<run folder>", "runs/a"), comments=True)


def printed_commands():
    """What the pages type after ``python -m fedsparse.train``: lists of words, without flags."""
    text = "\n".join(pages().values()).replace("\\\n", " ")
    lines = dict.fromkeys(re.findall(r"python -m fedsparse\.train ([^`\n]*)", text))
    words = [[word for word in typed_words(line) if "=" in word and not word.startswith("--")] for line in lines]
    return [those for those in words if those and not any(word.endswith(f"={own}") for word in those for own in OWN)]


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


@pytest.mark.slow
@pytest.mark.parametrize("words", printed_commands(), ids=" ".join)
def test_every_command_that_is_printed_composes(words):
    words = [word for word in words if not word.startswith(("resume=", "hydra"))]
    for cell in cells(words):
        check_typed(cell)
        check(composed(*cell))


ONES_OWN = ("exchange.filters.mine._target_", "mask_rule._target_", "client._target_")
ONES_OWN += ("exchange.x", "model.net.hidden")  # which are said to be refused
TYPED = {**pages(), **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "CHANGELOG.md")}}
TYPED |= {str(path): path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks").glob("0[12]*.ipynb"))}


@pytest.mark.parametrize("file", TYPED, ids=lambda file: Path(file).name)
def test_every_key_that_is_printed_is_one_of_conf(file):
    text, groups = TYPED[file], (*shipped.groups(), *shipped.sections())
    typed = set(re.findall(r"(?<![\w./<$({])\+?(\w+\.[\w.]+)=", text))
    known = {*shipped.settable(), *(f"trainer.{key}" for key in ALLOWED), *ONES_OWN}
    assert {key for key in typed if key.split(".")[0] in groups} - known == set()
    named = set(re.findall(r"`((?:\w+\.)+\w+)`", text)) if file.endswith(".md") else set()
    named = {key for key in named if not key.endswith((".json", ".png", ".safetensors", ".csv", ".jsonl"))}
    assert {key for key in named if key.split(".")[0] in (*shipped.sections(), "model", "server")} - known == set()


def test_no_figure_is_a_placeholder():
    for page, text in pages().items():
        assert not re.search(r"\b(TODO|TBD|XXX|RESULTS|BENCH)\b", text), page


BASH = {page: [block for block in blocks(page) if block.kind == "bash"] for page in pages()}


def test_at_most_ten_blocks_are_not_run_and_each_says_why():
    kept = [block for page in pages() for block in blocks(page) if block.why is not None]
    assert {block.kind for block in kept} == {"bash"}
    assert 0 < len(kept) <= 10
    assert all(len(block.why.split()) >= 2 for block in kept)
    assert "".join(pages().values()).count("norun:") == len(kept) + 1  # CONTRIBUTING names the mark


MAKE = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "docs/studies/replications.mk"))
TARGETS = set(re.findall(r"^([a-z-]+):", MAKE, re.M))


@pytest.mark.parametrize("page", pages())
def test_the_targets_of_make_that_a_page_names_exist(page):
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]+)(?:[ `]|$)", pages()[page], re.M)
    assert set(named) - TARGETS == set()


# --- every block is run, in the order of its page

HERE = {
    "fedsparse.data.datasets.digits",
    "fedsparse.data.stdlib_docs.stdlib_docs",
    "fedsparse.data.answers.docs_answers",
}
MODELS_TO_DOWNLOAD = ("bert_base", "qwen", "dino_vits16")
SHORT = {
    "federation.local_steps": "1",
    "federation.local_epochs": "null",
    "calibration.head_steps": "1",
    "calibration.batches": "1",
    "calibration.rounds": "1",
    "calibration.cache": "null",
    "explore.epochs": "null",
    "explore.steps": "1",
    "pictures": "false",
}
SKETCH = ("grid=3", "samples=20", "curvature=false")  # of a landscape
ROUNDS = 2  # at most


def shortened(words):
    """Type a command of training so that it takes seconds: the first value of what is swept, few rounds and steps."""
    flags = [word for word in words if "=" not in word]
    typed = [next(cells([word]), [word])[0] for word in words if "=" in word]
    typed = [word for word in typed if word.partition("=")[0] not in SHORT]
    rounds = [int(word.partition("=")[2]) for word in typed if re.fullmatch(r"federation\.rounds=\d+", word)]
    typed = [word for word in typed if not word.startswith("federation.rounds=")]
    if any(word.startswith("resume=") for word in typed):
        return [*flags, *typed, *([f"federation.rounds={ROUNDS}"] if rounds else [])]
    added = [f"{key}={value}" for key, value in SHORT.items()]
    added += [] if any(word.startswith("logger") for word in typed) else ["logger=csv"]
    added += ["hydra.sweeper.n_trials=1"] if "hydra/sweeper=search" in typed else []
    kept = ROUNDS if rounds or "trajectory=global" in typed else 1
    return [*flags, *typed, *added, f"federation.rounds={min(kept, *rounds, ROUNDS)}"]


def found_here(words):
    """Whether data and model are at hand; what needs a download is composed alone."""
    typed = [word for word in words if "=" in word and not word.startswith(("hydra", "resume="))]
    cfg = composed(*next(cells(typed)))  # without what a sweeper draws
    check(cfg)
    own = any(word.startswith("data.root=") and Path(word.partition("=")[2]).is_dir() for word in typed)
    downloads = any(f"model={name}" in typed for name in MODELS_TO_DOWNLOAD)
    downloads |= "model=timm" in typed and cfg.model.pretrained
    return (own or cfg.data._target_ in HERE) and not downloads


def run_module(name, words, monkeypatch):
    """Call a command's ``main`` in this process, with these arguments."""
    module = import_module(f"fedsparse.{name}")
    module = module if hasattr(module, "main") else import_module(f"fedsparse.{name}.__main__")
    monkeypatch.setattr(sys, "argv", [f"fedsparse.{name}", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which a command sets
    try:
        module.main()
    except SystemExit as end:  # as --help ends
        if end.code not in (0, None):
            pytest.fail(f"{name} {' '.join(words)}: {end.code}")


def run_shell(line):
    """Run a line as a shell does, with the interpreter of the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_measurement(name, words):
    """Hold the options of a command that takes minutes or hours against its help, and do not run it."""
    assert find_spec(f"fedsparse.{name}") is not None
    flags = [word for word in words if word.startswith("--")]
    listed = run_shell(f"python -m fedsparse.{name} --help") if flags else ""
    assert [flag for flag in flags if flag not in listed] == []


def run_line(line, monkeypatch):
    """Run one command of a block."""
    words = typed_words(line)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[:1] == ["make"]:
        return run_shell(f"make -n -C {ROOT} {shlex.join(words[1:])}")
    if words[:1] == ["cd"]:
        monkeypatch.chdir(words[1])
        return monkeypatch.syspath_prepend(Path.cwd())
    if words[:1] == ["torchrun"]:
        at = words.index("fedsparse.train") + 1
        return run_shell(shlex.join([*words[:at], *shortened(words[at:])]))
    if words[:2] != ["python", "-m"] or not words[2].startswith("fedsparse."):
        return run_shell(line)
    name, typed = words[2].removeprefix("fedsparse."), words[3:]
    if name.startswith(("bench", "studies")):
        return check_measurement(name, typed)
    if "hydra/sweeper=search" in typed:  # importing Optuna warns
        return run_shell(shlex.join([*words[:3], *shortened(typed)]))
    if name in ("train", "calibrate") and "--help" not in typed:
        typed = shortened(typed)
        resumed = any(word.startswith("resume=") for word in typed)
        whole = resumed or "--config-dir" in typed or found_here(typed)
        return run_module(name, typed, monkeypatch) if whole else None
    keys = {word.partition("=")[0] for word in typed}
    sketch = [word for word in SKETCH if name == "landscape" and word.partition("=")[0] not in keys]
    return run_module(name, [*typed, *sketch], monkeypatch)


def lines_of(block):
    """Commands of a block; one with a document in it is one command."""
    if "<<'END'" in block.text:
        return [block.text]
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


RUN = [page for page in pages() if any(block.why is None for block in BASH[page])]
FILES = re.compile(r"`((?:mine|conf)/[\w/.]+)`:\n\n```\w+\n(.*?)^```", re.M | re.S)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An empty folder, in which and from which Python finds packages; those of one's own are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_parts_of_ones_own_are_those_that_are_held_against_sums_by_hand():
    printed = dict(FILES.findall(pages()["docs/how-to/own-parts.md"]))
    held = {
        str(path.relative_to(OUTSIDE)): path.read_text()
        for path in OUTSIDE.rglob("*")
        if str(path.relative_to(OUTSIDE)) in printed
    }
    assert len(held) == 15
    assert {name: printed[name] for name in held} == held


LONG = ("docs/how-to/export.md", "docs/how-to/processes.md")  # a minute each
LONG += ("docs/tutorials/own-rule.md",)  # of which test_people.py types every line
EACH = [pytest.param(page, marks=[pytest.mark.soak] if page in LONG else []) for page in RUN]


@pytest.mark.slow
@pytest.mark.parametrize("page", EACH)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, own, monkeypatch):
    """Shortened: the first value of a sweep, few rounds and steps; its files of one's own lie in the folder."""
    for name, text in FILES.findall(pages()[page]):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("warnings.formatwarning", None)
    for block in BASH[page]:
        for line in lines_of(block) if block.why is None else ():
            run_line(line, monkeypatch)
