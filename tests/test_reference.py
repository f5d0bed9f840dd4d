"""The reference has every key of ``conf/``, every column and figure, every public name, and the wire's header."""

from __future__ import annotations

import doctest
import json
import re
import struct
import subprocess
import tomllib
from functools import cache
from importlib import import_module

import pytest
import reference
import yaml
from pages import ROOT, pages

from fedsparse import calibrate, run
from fedsparse.core import folder as names
from fedsparse.federation.exchange.wire import message
from fedsparse.federation.exchange.wire.positions import Coding
from fedsparse.federation.exchange.wire.values import DTYPES
from fedsparse.job import shipped

METRICS = pages()["docs/reference/metrics.md"]
SHORT = ["logger=csv", "pictures=false", "federation.rounds=1", "federation.local_steps=1", "calibration.head_steps=1"]
PLAIN = (bool, int, float, str, list, type(None))


@cache
def configuration():
    return reference.configuration()


def rows():
    """Cells of each row of the configuration's tables."""
    lines = [line for line in configuration().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def leaves(held, group):
    """Keys of plain values, below their group."""
    plain = {key for key, value in held.items() if isinstance(value, PLAIN) or not value}
    return {f"{group}.{key}" for key in plain if not any(part.startswith("_") for part in key.split("."))}


def keys():
    """Every key that a person may type, with a value of its own."""
    chosen = [group for group in shipped.groups() if group not in shipped.WHOLE]
    found = {
        key for group in chosen for name in shipped.options(group) for key in leaves(shipped.keys(group, name), group)
    }
    own = {
        key for key, value in shipped.main().items() if key not in ("defaults", "hydra") and isinstance(value, PLAIN)
    }
    return found | own | {key for section, held in shipped.sections().items() for key in leaves(held, section)}


def test_every_key_has_a_row_with_type_default_and_description():
    assert len(keys()) > 180
    listed = {row[0].strip("`") for row in rows()}
    assert keys() - listed == set()
    assert [row for row in rows() if len(row) != 4 or not all(row)] == []


def test_every_option_is_listed_with_what_it_is():
    for group in shipped.groups():
        for option in shipped.options(group):
            assert re.search(rf"^- `{group}={option}`: \S", configuration(), re.M), f"{group}={option}"


def test_defaults_are_those_of_the_files():
    defaults = {row[0].strip("`"): row[2].strip("`") for row in rows()}
    assert defaults["federation.num_clients"] == "20"
    assert defaults["pictures"] == "true"
    assert defaults["calibration.cache"] == "runs/.prepared"
    assert defaults["explore.lr"] == "${optimizer.lr}"
    assert "`[head.*]`" in configuration()


def test_the_examples_of_the_hooks_hold():
    for name in ("reference", "notebooks"):
        found = doctest.testmod(import_module(name))
        assert found.failed == 0
    assert doctest.testmod(reference).attempted == 3


def documented(heading):
    """Names in the first column of the tables below a heading of the metrics page."""
    text = METRICS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


FIGURES = r"loss|top1|top5|f1|precision|recall"
PATTERNS = (
    rf"(participants/(start|local|global)|non_participants/(start|global))/({FIGURES})_(mean|weighted|std|worst10)",
    rf"gap/(generalisation|local_start|local_global)/({FIGURES})_(mean|weighted)",
)


def unknown(columns, heading):
    """Columns that the page neither names nor describes by their parts."""
    known = documented(heading)
    return {name for name in columns if name not in known and not any(re.fullmatch(p, name) for p in PATTERNS)}


def header(folder, name):
    return (folder / name).read_text(encoding="utf-8").splitlines()[0].split(",")


def check_folder(folder):
    """Hold every column and figure of a run folder against the page."""
    assert unknown(header(folder, "metrics.csv"), "metrics.csv") == set()
    assert set(header(folder, "traffic.csv")) == documented("traffic.csv")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    last = {name for name in summary if name in documented("metrics.csv")}
    assert unknown(summary.keys() - last, "summary.json") == set()
    return summary


def test_the_columns_and_figures_of_a_run_are_described(tmp_path):
    options = ["model=mlp", "evaluation=per_client", "trajectory=global", "trajectory.path_norm=true"]
    run(
        [
            *options,
            "mask_rule=autoflip",
            "sparsity.mode=prune",
            "explore.steps=1",
            *SHORT,
            f"hydra.run.dir={tmp_path / 'a'}",
        ]
    )
    summary = check_folder(tmp_path / "a")
    assert {"compression", "flops_sparse", "non_participants/start/f1_std"} <= summary.keys()
    found = {name for name in header(tmp_path / "a", "clients.csv") if not name.startswith("share_")}
    assert found | {"share_<class>"} == documented("clients.csv")


def test_the_columns_and_figures_of_adapters_are_described(tmp_path):
    options = ["method=fedit", "model=vit_digits", "lora.r=1", "mask_rule=dense", "calibration.batches=1"]
    run([*options, "federation.num_clients=4", *SHORT, f"hydra.run.dir={tmp_path / 'a'}"])
    check_folder(tmp_path / "a")
    assert set(header(tmp_path / "a", "lora.csv")) == documented("lora.csv")
    run(["model=mlp", "model.local=['head.*']", "mask_rule=random", *SHORT, f"hydra.run.dir={tmp_path / 'b'}"])
    assert "personal/acc_best" in check_folder(tmp_path / "b")


def test_the_figures_of_a_calibration_are_described(tmp_path):
    options = ["model=mlp", "mask_rule=random", "logger=csv", "pictures=false", "calibration.head_steps=1"]
    found = calibrate.run([*options, f"hydra.run.dir={tmp_path}"]).keys() - {"folder"}
    text = METRICS.split("\n## calibration.json\n")[1]
    assert {name for name in found if f"`{name}`" not in text and name not in documented("summary.json")} == set()


@pytest.mark.slow
def test_the_figures_of_a_language_model_are_described(tmp_path):
    options = ["experiment=departments_docs", "federation.local_epochs=null", "pictures=false", "logger=csv"]
    run([*options, "federation.rounds=1", "federation.local_steps=1", f"hydra.run.dir={tmp_path}"])
    assert "test/perplexity" in check_folder(tmp_path)


def test_every_file_of_a_run_folder_is_listed():
    text = pages()["docs/reference/run-folder.md"]
    kept = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    assert len(kept) > 30
    assert {name for name in kept if name not in text} == set()


def test_the_header_of_a_message_is_the_page_s():
    text = pages()["docs/reference/wire-format.md"]
    table = text.split("\n## Header: 48 bytes\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| (\d+) \| (4 bytes|\w+) \| (\w[^:|]*)", table, re.M)
    codes = {"4 bytes": "4s", "uint8": "B", "uint32": "I", "float64": "d"}
    assert "<" + "".join(codes[kind] for _, kind, _ in listed) == message.HEADER.format
    offsets = [
        struct.calcsize("<" + "".join(codes[kind] for _, kind, _ in listed[:place])) for place in range(len(listed))
    ]
    assert [int(offset) for offset, _, _ in listed] == offsets
    assert message.HEADER.size == 48
    assert f"version: {message.VERSION}" in text
    for code, dtype in DTYPES.items():
        assert f"| {code} | {str(dtype).removeprefix('torch.')}" in text
    assert len(re.findall(r"^\| \d \|", text.split("## Positions")[1].split("## ")[0], re.M)) == len(Coding)


def test_every_package_with_public_names_has_a_page_and_every_name_a_docstring():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "fedsparse").rglob("__init__.py")
        if "__all__" in path.read_text(encoding="utf-8")
    }
    inner = {"fedsparse.bench", "fedsparse.federation.exchange.wire"}  # a command, and a part of the exchange
    assert found - set(reference.PACKAGES) == inner
    written = reference.api()
    assert "::: fedsparse.masks.rule.MaskRule" in written["reference/api/fedsparse.masks.md"]
    described = re.findall(r"^::: (\S+)$", "\n".join(written.values()), re.M)
    assert len(described) == len(set(described)) > 80


def test_the_site_has_every_page_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"'(\S+\.md)'", str(config["nav"]))
    own = {name.removeprefix("docs/") for name in pages() if name.startswith("docs/")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    more = {"reference/configuration.md", "reference/commands.md", "changelog.md", "contributing.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == own | notebooks | more | {f"reference/api/{name}.md" for name in reference.PACKAGES}


def test_the_site_asks_no_other_server():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    sheets = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in config["extra_css"]]
    assert config["theme"]["font"] is False
    assert not re.search(r"://|@import|url\(", "".join(sheets))
    assert "extra_javascript" not in config


def test_every_command_has_help_or_a_line():
    assert {f"fedsparse.{name}" for name in reference.COMMANDS} <= reference.runnable()
    for command in reference.others():
        assert len(import_module(command.removeprefix("python -m ")).__doc__.split()) > 3, command


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".docs-venv" / ".ready").exists(), reason="make docs installs mkdocs")
def test_the_site_builds_strictly(tmp_path):
    python = ROOT / ".docs-venv" / "bin" / "python"
    command = [python, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "configuration.html").stat().st_size > 100_000


def test_the_pins_of_the_site_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "docs" / "requirements.txt").read_text(encoding="utf-8").split()
    assert set(project["optional-dependencies"]["docs"]) <= set(pinned)
    assert all("==" in pin for pin in pinned)
