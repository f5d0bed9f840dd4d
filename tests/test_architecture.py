"""The house stands as drawn: imports run one way, and the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedsparse"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
# a file may import from its own level and from those below; what is listed nowhere stands on top
ORDER = (
    "core",
    "optim",
    "data",
    "models",
    "masks",
    "federation",
    "preparation",
    "simulation",
    "analysis",
    "job",
    "landscape",
    "adapters",
)
LEVELS = {name: level for level, name in enumerate(ORDER)}
ENTRY = len(ORDER)
# who may import the libraries that shape everything they touch
MAY = {
    "hydra": ("job/", "train.py", "calibrate.py", "repeat.py"),
    "lightning": ("data/datamodule.py", "simulation/", "bench/federated.py", "bench/gpu/"),
    "flwr": ("deploy/", "bench/peers/"),
    "wandb": ("simulation/artifacts.py", "bench/federated.py"),
    "omegaconf": ("job/", "train.py", "calibrate.py", "repeat.py"),
}
# of job/, what reads keys of a configuration: it is composed and checked, assembled, stored and compared
READS_KEYS = (
    "assemble.py",
    "budget.py",
    "config.py",
    "deployed.py",
    "finished.py",
    "heading.py",
    "resume.py",
    "unread.py",
)


def place(path):
    return path.relative_to(PACKAGE).as_posix()


def level(name):
    return LEVELS.get(name, ENTRY)


def imported(path):
    """Dotted names of all modules a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_level(path):
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return level(first)


def arrows_back(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "fedsparse" and len(parts) > 1 and level(parts[1]) > own_level(path):
            yield name


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_run_one_way(path):
    assert list(arrows_back(path)) == []


@pytest.mark.parametrize("path", FILES, ids=place)
@pytest.mark.parametrize("library", list(MAY))
def test_libraries_stay_where_they_belong(path, library):
    used = any(name.split(".")[0] == library for name in imported(path))
    assert not used or place(path).startswith(MAY[library])


def keys_read(tree):
    """Keys that are read of anything called cfg, such as ``job.cfg.seed``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "cfg":
            yield node.attr
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] == "cfg":
            yield ast.unparse(node.slice)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_configuration_is_read_in_one_room(path):
    found = set(keys_read(ast.parse(path.read_text())))
    assert path.parent.name == "job" or not found
    if path.name == "execute.py":  # how many processes there are to be is asked before anything is assembled
        assert found == {"trainer"}
    elif path.name not in READS_KEYS:
        assert not found


# what of the plain values is read by its key: for a cache, for what a summary repeats, and to say it as it was typed
PLAIN_VALUES = {
    "prepare.py": {"head", "client", "sparsity", "calibration"},
    "summary.py": {"exchange", "optimizer"},
    "execute.py": {"federation", "trainer"},
}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ("job", "landscape")], ids=place)
def test_plain_values_of_a_configuration_are_no_second_way_to_read_it(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            home = ast.unparse(node.value)
            found |= {node.slice.value} if home == "config" or home.endswith(".config") else set()
    if path.name not in ("assemble.py", *READS_KEYS):
        assert found == PLAIN_VALUES.get(path.name, set())


def test_reading_a_key_is_found():
    assert set(keys_read(ast.parse("a = job.cfg.seed + cfg['lr'] + cfg.model.head + other.seed"))) == {
        "seed",
        "'lr'",
        "model",
    }


def test_the_root_holds_commands_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        "__init__",
        "calibrate",
        "export",
        "new",
        "repeat",
        "report",
        "train",
    }


def test_the_check_itself_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("test_architecture.PACKAGE", tmp_path)
    wrong = tmp_path / "masks" / "wrong.py"
    wrong.parent.mkdir()
    wrong.write_text("from fedsparse.simulation.module import ClientModule\n")
    assert list(arrows_back(wrong)) == ["fedsparse.simulation.module", "fedsparse.simulation.module.ClientModule"]


def assert_unpickles_by_an_own_list(tree):
    """The one file that reads pickles, CIFAR's: by a subclass that looks names up and notes calls itself."""
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert [ast.unparse(base) for base in classes["PlainUnpickler"].bases] == ["PYTHONS"]
    own = {node.name for node in classes["PlainUnpickler"].body if isinstance(node, ast.FunctionDef)}
    assert {"find_class", "load_reduce", "load_build"} <= own
    assert not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(tree))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle._Unpickler", "pickle.UnpicklingError"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert {name for name in called if re.fullmatch(r"np\.\w+", name)} == {"np.frombuffer", "np.dtype"}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_nothing_unpickles(path):
    text = path.read_text()
    if place(path) == "data/unpickle.py":
        assert_unpickles_by_an_own_list(ast.parse(text))
    else:
        assert "import pickle" not in text
    assert "weights_only=False" not in text
    assert "allow_pickle=True" not in text
