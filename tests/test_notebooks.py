"""Every notebook runs from top to bottom in a kernel, is stored without outputs, and names only what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from nbclient import NotebookClient
from omegaconf import OmegaConf

from fedsparse.job.config import check, register_resolvers
from fedsparse.job.shipped import conf_dir

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PICTURES = {"01_first_run": 3, "02_masks": 6, "03_sweep_and_report": 4}  # shown at least
GROUPS = {path.name for path in conf_dir().iterdir() if path.is_dir()} | {"hydra/launcher"}
every_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def sources(path, kind):
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def overrides(path):
    """What the notebook names as one would type it: quoted in code, as a word in text."""
    key = r"([a-z_]+(?:[./][a-z_]+)*)"
    code = re.findall(rf'"{key}=([^"=]+)"', "\n".join(sources(path, "code")))
    return code + re.findall(rf"(?<=[\s`]){key}=([^\s`]+)", "\n".join(sources(path, "markdown")))


def composed(*options):
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(options), return_hydra_config=True)


def has(node, key):
    for part in key.split("."):
        if part not in node:
            return False
        node = node[part]
    return True


def test_there_are_three_notebooks():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PICTURES)


@every_notebook
def test_it_is_valid_and_stored_without_outputs(path):
    nbformat.validate(read(path))
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert (cell.outputs, cell.execution_count, dict(cell.metadata)) == ([], None, {})


@every_notebook
def test_the_options_it_names_exist(path):
    named = overrides(path)
    assert len(named) > 5
    fixed = [(key, value.split(",")) for key, value in named if key in GROUPS and "{" not in value]
    for group, options in fixed:
        for option in options:
            assert group == "hydra/launcher" or (conf_dir() / group / f"{option}.yaml").exists(), f"{group}={option}"
    cfg = composed(*(f"{group}={options[0]}" for group, options in dict(fixed).items()))
    known = OmegaConf.to_container(cfg, resolve=False)
    assert [key for key, _ in named if key not in GROUPS and not has(known, key)] == []


@every_notebook
def test_the_commands_in_its_text_can_be_run(path):
    for block in re.findall(r"```bash\n(.*?)```", "\n".join(sources(path, "markdown")), flags=re.DOTALL):
        for line in block.splitlines():
            program, options = shlex.split(line)[:3], shlex.split(line)[3:]
            assert program == ["python", "-m", "fedsparse.train"]
            check(composed(*options))


@pytest.mark.parametrize("colab", [False, True])
def test_the_first_cell_keeps_the_torch_of_colab_and_does_nothing_elsewhere(colab, tmp_path, monkeypatch):
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command))
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(sources(FOLDER / "01_first_run.ipynb", "code")[0], {})
    if not colab:
        assert (called, list(tmp_path.iterdir())) == ([], [])
        return
    (command,) = called
    kept = (tmp_path / command[command.index("-c") + 1]).read_text().split()
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    installed = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    assert [line.split("+")[0] for line in kept] == [f"{k}=={v.split('+')[0]}" for k, v in installed.items()]


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Run a notebook in a kernel, from an empty folder that stays empty; gives its cells."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def go(path):
        notebook = read(path)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}}).execute()
        assert list(here.iterdir()) == []
        return notebook.cells

    return go


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem == "01_first_run" else pytest.mark.soak, id=path.stem)
        for path in sorted(FOLDER.glob("*.ipynb"))
    ],
)
def test_it_runs_and_shows_its_pictures(path, executed):
    shown = [output for cell in executed(path) for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= PICTURES[path.stem]
    printed = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    if path.stem == "03_sweep_and_report":  # 2 partitions x 3 rules x 2 seeds, then a third seed
        assert printed.count("is finished after") == 12
        assert printed.count("test accuracy") == 12 + 6
